"""Our files against the sizes that papers report, on LeNet-300-100 and LeNet-5 with all of MNIST, and on VGG-16 with
CIFAR-10 (for a GPU).

    python -m benchmarks.published [--data ../shared/data] [--task lenet5] [--time-budget 8m] [--table]

One search a task in runs/bench-published-*, taken up again where it was stopped; its front goes to
benchmarks/results/published.json. All but the last 5,000 training images train, those validate. Every file of the
front, which validation chose, is measured on the 10,000 test images. Published numbers are as the table of MIRACLE
(Havasi et al., 2019), that of soft weight sharing, that of LilNetX and the tutorial of EPR in TensorFlow Compression
give them, bytes those of the coded weights; ours are those of the whole file.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.searches import front_of

RESULTS = Path(__file__).parent / "results" / "published.json"
SEARCHES = {"lenet_300_100": (50, 0.984), "lenet5": (40, 0.99), "vgg16": (50, 0.895)}
"""Task -> trials, and the least accuracy that is looked for."""
PUBLISHED = {
    "lenet_300_100": (
        ("Deep Compression (Han et al., 2016)", 26_700, 1.58),
        ("Soft weight sharing (Ullrich et al., 2017)", 16_700, 1.94),
        ("EPR (Oktay et al., 2020)", 8_560, 1.9),
    ),
    "lenet5": (
        ("Deep Compression (Han et al., 2016)", 44_000, 0.74),
        ("Soft weight sharing (Ullrich et al., 2017)", 10_600, 0.97),
        ("Weightless (Reagen et al., 2018)", 4_520, 1.0),
        ("MIRACLE, lowest error (Havasi et al., 2019)", 3_030, 0.69),
        ("EPR (Oktay et al., 2020)", 2_840, 1.0),
        ("Bayesian compression, GHS (Louizos et al., 2017)", 2_300, 1.0),
        ("MIRACLE, smallest (Havasi et al., 2019)", 1_520, 0.96),
    ),
    "vgg16": (
        ("DeepCABAC (Wiedemann et al., 2020)", 960_000, 9.0),
        ("Bayesian compression, GNJ (Louizos et al., 2017)", 642_000, 8.6),
        ("Bayesian compression, GHS (Louizos et al., 2017)", 525_000, 9.2),
        ("MIRACLE, lowest error (Havasi et al., 2019)", 384_000, 6.57),
        ("MIRACLE, smallest (Havasi et al., 2019)", 135_000, 10.0),
        ("LilNetX (Girish et al., 2022)", 129_000, 7.4),
        ("EPR (Oktay et al., 2020)", 101_000, 10.0),
        ("LilNetX, extreme (Girish et al., 2022)", 76_000, 10.0),
    ),
}
"""Task -> (method, bytes, test error in percent). Bytes from ratios: Deep Compression on LeNet-300-100
(40), soft weight sharing (64 and 162)."""


def search(name: str, **settings: Any) -> dict[str, Any]:
    budget, least = SEARCHES[name]
    folder, task = Path("runs") / f"bench-published-{name}", f"benchmarks.tasks:{name}_full"
    front = front_of(folder, task, budget, min_accuracy=least, **settings)
    points = [(p.size_bytes, p.val_accuracy, p.test_accuracy) for p in front]
    return {"base": vars(front.base), "front": points}


def table(name: str, result: dict[str, Any]) -> Table:
    """A line for each published point: our smallest file of at most that error, and our best of at most those bytes."""
    base = result["base"]
    title = f"{name}: {base['size_bytes']:,} bytes, test error {100 * (1 - base['test_accuracy']):.2f}%"
    shown = Table(title=title, title_justify="left", box=MARKDOWN)
    columns = ("published", "bytes", "test error, %", "our bytes at that error", "our test error at those bytes, %")
    for column in columns:
        shown.add_column(column, justify="left" if column == "published" else "right")
    ours = [(size, round(100 * (1 - test), 2)) for size, _, test in result["front"]]
    for method, size, error in PUBLISHED[name]:
        smaller = min((s for s, e in ours if e <= error), default=None)
        better = min((e for s, e in ours if s <= size), default=None)
        shown.add_row(
            method,
            f"{size:,}",
            f"{error:.2f}",
            f"{smaller:,}" if smaller else "-",
            f"{better:.2f}" if better is not None else "-",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with mnist/ and cifar10/")
    parser.add_argument("--task", choices=[*SEARCHES], action="append")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--time-budget")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    given = parser.parse_args()
    if given.data:
        os.environ["AUTOCOMPRESS_DATA"] = given.data
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    out = Console(width=140)
    for name in given.task or [*SEARCHES]:
        if not given.table:
            results[name] = search(name, workers=given.workers, time_budget=given.time_budget)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        if name in results:
            out.print(table(name, results[name]))


if __name__ == "__main__":
    main()
