"""What each technique is worth alone, and all together: the smallest file at little lost accuracy.

    python -m benchmarks.techniques [--data ../shared/data] [--task digits] [--only ROW ...] [--table]

One search a row, over nothing but this technique (and what it acts on: importance ranks channels, regrowing needs
sparsity), on digits and on MNIST LeNet-5 (trials train on the first 4,000 images). All rows of a task start from
the same original. The searches are kept in runs/bench-techniques and not repeated, so a run that was stopped goes on.
Accuracy is lost against the original's, on the validation split, by which the search selects; the test accuracy of
the same file stands beside it. Writes benchmarks/results/techniques.json; --table prints it again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import autocompress as ac
from autocompress.front import hypervolume
from autocompress.space import SearchSpace
from benchmarks.searches import front_of

RESULTS = Path(__file__).parent / "results" / "techniques.json"
FOLDER = Path("runs") / "bench-techniques"
TASKS = {"digits": ("digits", 1.0), "lenet5": ("benchmarks.tasks:lenet5_short", 0.4)}
"""Name -> (task, share of the trials of each row)."""
LOSSES = (0.005, 0.01)

SPARSITY = "sparsity: [0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]"
CHANNELS = "channels: [1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.15]"
INTEGERS = "weights: [float32, int8, int6, int5, int4, int3, int2]"

ROWS: dict[str, tuple[int, str, str]] = {
    "unstructured pruning": (16, SPARSITY, ""),
    "N:M pruning": (12, 'sparsity: [0, "4:8", "2:4", "1:4", "1:8"]', ""),
    "threshold pruning": (
        12,
        "sparsity: [0, threshold-0.25, threshold-0.5, threshold-1, threshold-1.5, threshold-2]",
        "",
    ),
    "pruning, regrow by gradient": (16, SPARSITY, "regrow: [gradient]"),
    "pruning, regrow at random": (16, SPARSITY, "regrow: [random]"),
    "pruning, exchange between layers": (16, SPARSITY, "exchange: [magnitude]"),
    "pruning, activity penalty": (12, SPARSITY, "activity_penalty: [l1-0.001, l1-0.01, l2-0.01]"),
    **{
        f"channels, {name}": (12, CHANNELS, f"importance: [{name}]")
        for name in ("l2", "l1", "geometric-median", "lamp", "activation", "kl", "taylor", "gates", "random")
    },
    "channels, global ranking": (12, CHANNELS, "ranking: [global]"),
    "dropped blocks": (6, "structure: [keep, drop]", ""),
    "low rank": (12, "structure: [keep, lowrank-0.5, lowrank-0.35, lowrank-0.25, lowrank-0.17, lowrank-0.12]", ""),
    "stacked blocks, ensembles": (
        12,
        "structure: [keep, stack-2x0.25, stack-3x0.15]",
        "structure: [keep, stack-2, stack-2x0.35, stack-3, stack-4, stack-2x0.25, stack-3x0.2]",
    ),
    "integers": (16, INTEGERS, ""),
    "integers by channel": (
        12,
        "weights: [float32, int8-channel, int6-channel, int4-channel, int3-channel, int2-channel]",
        "",
    ),
    "integers, KL clipping": (12, INTEGERS, "weight_clipping: [kl]"),
    "integers, no clipping": (12, INTEGERS, "weight_clipping: [max]"),
    "integers, rate penalty": (16, INTEGERS, "rate_penalty: [0.05, 0.2, 1, 4]"),
    "integers, rounding by rate": (12, INTEGERS, "rounding: [0.1, 0.3]"),
    "integers, KL bound": (12, INTEGERS, "kl_bound: [0.005, 0.02]"),
    "integers, bfloat16 training": (12, INTEGERS, "precision: [bfloat16]"),
    "integers, learning rate": (12, INTEGERS, "learning_rate: [2, 4]"),
    "short floats": (
        8,
        "weights: [float32, float16, bfloat16, e8m5, e8m3, e8m2]",
        "vectors: [float32, float16, e8m5, e8m3, e8m2]",
    ),
    "float8": (8, "weights: [float32, float8-e4m3, float8-e5m2]", ""),
    "ternary and binary": (12, "weights: [float32, ternary, binary]", ""),
    "codebooks": (12, "weights: [float32, codebook-64, codebook-32, codebook-16, codebook-8, codebook-4]", ""),
    "shared filters": (10, "weights: [float32, filters-0.75, filters-0.5, filters-0.25]", ""),
    # these change no bytes: without their neutral choice, so that they are there at all
    "activation functions": (6, "activation: [relu6, hardtanh, hardswish]", ""),
    "piecewise linear activations": (4, "activation: [piecewise-16, piecewise-8, piecewise-4]", ""),
    "binary activations": (4, "activation: [step-sigmoid, step]", ""),
    "sparse activations": (4, "activation: [fatrelu-0.8, topk-0.2]", ""),
    **{
        f"4-bit activations, {name}": (4, "activation_bits: [4]", f"activation_clipping: [{name}]")
        for name in ("max", "percentile", "mse", "kl", "learned")
    },
    "joint: default, few trials": (16, "", ""),
    "joint: default": (50, "", ""),
    "joint: everything": (50, "", ""),
}
"""Row -> (trials on digits, dimensions of every layer, dimensions of the model)."""


def space_of(row: str) -> SearchSpace | str:
    _, layers, model = ROWS[row]
    if row.startswith("joint: "):
        return row.removeprefix("joint: ").removesuffix(", few trials")
    return SearchSpace.parse(f"layers: {{'*': {{{layers}}}}}\n" + (f"model: {{{model}}}" if model else ""), row, row)


def trials(task: str, row: str) -> int:
    return max(4, round(TASKS[task][1] * ROWS[row][0]))


def measured(task: str, row: str) -> dict[str, Any]:
    began = time.monotonic()
    folder = FOLDER / task / "".join(letter if letter.isalnum() else "-" for letter in row)
    front = front_of(folder, TASKS[task][0], trials(task, row), space=space_of(row))
    base, points = front.base, list(front)
    worst = 0.1  # of the majority class, about
    result = {
        "task": task,
        "row": row,
        "trials": trials(task, row),
        "base_bytes": base.size_bytes,
        "base_val": base.val_accuracy,
        "base_test": base.test_accuracy,
        "hypervolume": hypervolume([(p.size_bytes, p.val_accuracy) for p in points], base.size_bytes, worst),
        "front": [[p.size_bytes, p.val_accuracy, p.test_accuracy] for p in points],
        "seconds": time.monotonic() - began,
    }
    for lost in LOSSES:
        fit = [p for p in points if p.val_accuracy >= base.val_accuracy - lost - 1e-9]
        best = min(fit, key=lambda p: p.size_bytes, default=None)
        result[f"at {100 * lost:g}"] = [best.size_bytes, best.val_accuracy, best.test_accuracy] if best else None
    return result


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="smallest file at lost validation accuracy (points)", title_justify="left")
    for name in ("task", "technique", "trials", "at 0.5: bytes", "ratio", "test", "at 1: bytes", "ratio", "test", "HV"):
        shown.add_column(name, justify="left" if name in ("task", "technique") else "right", no_wrap=True)
    for r in results:
        cells = []
        for lost in LOSSES:
            best = r[f"at {100 * lost:g}"]
            cells += [f"{best[0]:,}", f"1/{r['base_bytes'] / best[0]:.1f}", f"{best[2]:.4f}"] if best else ["-", "", ""]
        shown.add_row(r["task"], r["row"], str(r["trials"]), *cells, f"{r['hypervolume']:.2f}")
    return shown


def markdown(results: list[dict[str, Any]]) -> str:
    """One row a technique, tasks side by side, for docs/benchmarks/techniques.md."""
    known = {(r["task"], r["row"]): r for r in results}
    heads = [f"{task}: {text}" for task in TASKS for text in ("trials", "at 0.5", "test", "at 1", "test")]
    lines = ["| technique | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for row in ROWS:
        cells = []
        for task in TASKS:
            result = known.get((task, row))
            cells.append(str(result["trials"]) if result else "")
            for lost in LOSSES:
                best = result[f"at {100 * lost:g}"] if result else None
                share = f" (1/{result['base_bytes'] / best[0]:.3g})" if result and best else ""
                cells += [f"{best[0]:,}{share}", f"{best[2]:.4f}"] if best else ["-", ""]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with mnist/")
    parser.add_argument("--task", choices=[*TASKS], action="append")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="rows by name")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    parser.add_argument("--markdown", action="store_true", help="the same, for docs/benchmarks/techniques.md")
    given = parser.parse_args()
    if given.data:
        os.environ["AUTOCOMPRESS_DATA"] = given.data
    known = {(r["task"], r["row"]): r for r in json.loads(RESULTS.read_text())} if RESULTS.is_file() else {}
    out = Console(width=150)
    for task in () if given.table or given.markdown else given.task or TASKS:
        for row in given.only or ROWS:
            out.print(f"{time.strftime('%H:%M:%S')} {task}: {row}", highlight=False)
            try:
                known[task, row] = measured(task, row)
            except ac.AutocompressError as error:  # this model has no part for it
                out.print(f"  {error}", highlight=False)
                continue
            ordered = [known[t, r] for t in TASKS for r in ROWS if (t, r) in known]
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    results = [known[t, r] for t in TASKS for r in ROWS if (t, r) in known]
    if given.markdown:
        print(markdown(results))
    else:
        out.print(table(results))


if __name__ == "__main__":
    main()
