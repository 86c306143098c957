"""The artifact against its peers: the same tensors, in the same run.

    python -m benchmarks.artifact [--data ../shared/data] [--quick] [--task resnet20 ...]

Real tensors come from searches on digits, MNIST (LeNet-300-100, LeNet-5) and CIFAR-10 (ResNet-20, whose original
takes a GPU to train), at up to five operating points of each front: from the largest file to the smallest that loses
at most 10 points. The searches are kept in runs/bench-* and not repeated. Synthetic ones have 500 to 10 M
weights. Also: overhead, rates, memory, time of the first call, and how near the size estimate comes.
Writes benchmarks/results/artifact.json. --quick: digits only, synthetic tensors up to 500,000. --task: the real
tensors of these tasks alone, beside the results there are.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import autocompress as ac
from autocompress.artifact.coder import CoderState
from autocompress.artifact.codes import write_codes
from autocompress.artifact.container import Plan, decode_artifact, encode_artifact
from autocompress.recipe import Recipe
from autocompress.techniques.base import coding_of
from benchmarks.peers import Array, Layout, peers
from benchmarks.searches import front_of

RESULTS = Path(__file__).parent / "results" / "artifact.json"
TASKS = {"digits": 50, "lenet_300_100": 14, "lenet5": 14, "resnet20": 12}
"""Task -> budget of the search that makes its tensors."""
POINTS, LOST = 5, 0.10
SMALL = 1000
out = Console(width=140)


def tensors_front(name: str) -> ac.ParetoFront:
    """The front whose files hold the tensors of a task."""
    out.print(f"{name}: a search of {TASKS[name]} trials ...")
    task = "digits" if name == "digits" else f"benchmarks.tasks:{name}"
    return front_of(Path("runs") / f"bench-{name}", task, TASKS[name])


def operating_points(front: ac.ParetoFront) -> list[ac.FrontPoint]:
    useful = [p for p in front if p.val_accuracy >= front.base.val_accuracy - LOST]
    picked = {round(i * (len(useful) - 1) / max(POINTS - 1, 1)) for i in range(POINTS)}
    return [useful[i] for i in sorted(picked, reverse=True)]


@functools.cache
def codes_of(path: Path) -> tuple[dict[str, tuple[Array, Layout, int]], int, int]:
    """(tensor -> codes, layout and bytes in the file; bytes of the header; bytes of the file)."""
    artifact = ac.read_artifact(path)
    tensors = {}
    for name, tensor in artifact.tensors.items():
        if tensor.choice not in ("constant", "raw"):
            coding = coding_of(tensor.choice)
            coded = coding.encode(tensor.coded, tensor.choice, torch.tensor(tensor.parameters))
            tensors[name] = (coded.codes, coding.layout(tensor.choice), tensor.size_bytes)
    return tensors, artifact.header_bytes, artifact.size_bytes


def real_models(names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        front = tensors_front(name)
        for point in operating_points(front):
            tensors, header, size = codes_of(point.path)
            layers = sum(1 for codes, _, _ in tensors.values() if codes.ndim > 1)
            row: dict[str, Any] = {
                "model": name,
                "val_accuracy": point.val_accuracy,
                "test_accuracy": point.test_accuracy,
                "weights": sum(codes.size for codes, _, _ in tensors.values()),
                "layers": layers,
                "file": size,
                "header": header,
                "header_allowed": 64 + 12 * layers,
                "coded": size - header,
                "larger_than_nncodec": [],
            }
            for peer, measure in peers().items():
                row[peer] = 0
                for tensor, (codes, layout, mine) in tensors.items():
                    theirs = measure(codes, layout)
                    row[peer] += theirs
                    if peer == "NNCodec" and codes.size > SMALL and mine > theirs:
                        row["larger_than_nncodec"].append([tensor, codes.size, mine, theirs])
            rows.append(row)
    return rows


def synthetic(largest: int) -> list[dict[str, Any]]:
    """Independent values, and values whose rows and columns differ, as pruned layers have them."""
    rng = np.random.default_rng(0)
    rows = []
    for size in (n for n in (500, 5_000, 50_000, 500_000, 10_000_000) if n <= largest):
        columns = max(20, int(size**0.5))
        shape = (size // columns, columns)
        for kind, bits, density in (
            ("4-bit dense", 4, 1.0),
            ("4-bit, 90% zeros", 4, 0.1),
            ("2-bit, 98% zeros", 2, 0.02),
            ("4-bit, 90% zeros, uneven columns", 4, 0.1),
        ):
            top = 1 << (bits - 1)
            values = np.rint(rng.laplace(0, top / 3, shape)).clip(-top, top - 1).astype(np.int32)
            values[values == 0] = 1
            share = np.full(shape[1], density)
            if "uneven" in kind:
                share = np.minimum(density * rng.exponential(1, shape[1]), 1)
            codes = values * (rng.random(shape) < share)
            layout = (0, bits - 1)
            state = CoderState()
            write_codes(state, codes, *layout)
            row: dict[str, Any] = {"tensor": kind, "weights": codes.size, "coded": len(state.finish())}
            for peer, measure in peers().items():
                if size <= 500_000 or peer in ("NNCodec", "zero-order", "float16"):
                    row[peer] = measure(codes, layout)
            rows.append(row)
    return rows


def sparse_tensor(zeros: float, size: int) -> torch.Tensor:
    """Float32 [size / 2048, 2048] whose int4 coding has that share of zeros."""
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(0, 2, (size // 2048, 2048))).clip(-8, 7)
    values[values == 0] = 1
    return torch.from_numpy((values * (rng.random(values.shape) >= zeros)).astype(np.float32) / 16)


def plan_of(weight: torch.Tensor) -> dict[str, Plan]:
    return {"w": Plan(weight, "int4", torch.tensor([-4.0]))}


def rates(size: int) -> list[dict[str, Any]]:
    """Millions of weights a second through whole files, one thread, median of three."""
    rows = []
    for zeros in (0.7, 0.8, 0.9, 0.95):
        plans = plan_of(sparse_tensor(zeros, size))
        data = encode_artifact(plans, Recipe())

        def seconds(work: Callable[[], object]) -> float:
            took = []
            for _ in range(3):
                began = time.perf_counter()
                work()
                took.append(time.perf_counter() - began)
            return statistics.median(took)

        encode = seconds(functools.partial(encode_artifact, plans, Recipe()))
        decode = seconds(functools.partial(decode_artifact, data))
        rows.append(
            {"zeros": zeros, "weights": size, "encode_per_second": size / encode, "decode_per_second": size / decode}
        )
    return rows


def memory(size: int) -> dict[str, float]:
    """Peak memory of a fresh process above what it had, as a multiple of the decoded float32 tensor."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.acz"
        file.write_bytes(encode_artifact(plan_of(sparse_tensor(0.9, size)), Recipe()))
        multiples = {}
        for work in ("encode", "decode"):
            command = [sys.executable, "-m", "benchmarks.artifact", "--measure", work, str(file), str(size)]
            multiples[work] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return multiples


def measure_memory(work: str, file: str, size: int) -> None:
    encode_artifact(plan_of(sparse_tensor(0.9, 4096)), Recipe())
    weight = sparse_tensor(0.9, size) if work == "encode" else torch.empty(0)
    data = Path(file).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    if work == "encode":
        encode_artifact(plan_of(weight), Recipe())
    else:
        decode_artifact(data)
    print((_resident("VmHWM") - before) / (4 * size))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def first_call(path: Path) -> dict[str, float]:
    """Seconds to read a file in a fresh process, imports not counted: compiled before, and never yet."""
    code = (
        "import sys, time, autocompress as ac; began = time.perf_counter(); "
        "ac.read_artifact(sys.argv[1]); print(time.perf_counter() - began)"
    )
    seconds = {}
    with tempfile.TemporaryDirectory() as empty:
        for name, environment in (("compiled before", {}), ("first on this machine", {"NUMBA_CACHE_DIR": empty})):
            command = [sys.executable, "-c", code, str(path)]
            for _ in range(1 if environment else 2):
                done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
            seconds[name] = float(done.stdout)
    return seconds


def estimates(names: list[str]) -> dict[str, list[float]]:
    """Model -> |estimated / file - 1| of each trial: the rate model on fine-tuned weights, before packing."""
    errors: dict[str, list[float]] = {}
    for name in names:
        for path in sorted((Path("runs") / f"bench-{name}" / "trials").glob("*/metrics.json")):
            metrics = json.loads(path.read_text())
            errors.setdefault(name, []).append(abs(metrics["estimated_bytes"] / metrics["size_bytes"] - 1))
    return errors


def show(title: str, rows: list[dict[str, Any]], first: list[str], ratio: str) -> None:
    table = Table(title=title, title_justify="left")
    names = [name for name in peers() if any(name in row for row in rows)]
    for name in [*first, *names, "/ NNCodec"]:
        table.add_column(name, justify="left" if name in ("model", "tensor") else "right")
    for row in rows:
        values = [row.get(name, "") for name in [*first, *names]]
        cells = [f"{v:.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in values]
        table.add_row(*cells, f"{row[ratio] / row['NNCodec']:.3f}" if "NNCodec" in row else "")
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with mnist/ and cifar10/")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", choices=[*TASKS], action="append")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        work, file, size = arguments.measure
        measure_memory(work, file, int(size))
        return
    if arguments.data:
        os.environ["AUTOCOMPRESS_DATA"] = str(Path(arguments.data).resolve())
    torch.set_num_threads(1)
    names = ["digits"] if arguments.quick else arguments.task or list(TASKS)
    models = real_models(names)
    show("real models, bytes", models, ["model", "val_accuracy", "file", "header", "coded"], "file")
    errors = estimates(names)
    for name, values in errors.items():
        out.print(f"size estimate, {name}: median {statistics.median(values):.2%} off, worst {max(values):.2%}")
    if arguments.task:
        known = json.loads(RESULTS.read_text())
        known["real"] = [row for row in known["real"] if row["model"] not in names] + models
        known["estimate"] |= errors
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        return
    made = synthetic(500_000 if arguments.quick else 10_000_000)
    show("synthetic tensors, bytes", made, ["tensor", "weights", "coded"], "coded")
    size = 1 << 20 if arguments.quick else 5 << 20
    speed = rates(size)
    for row in speed:
        encode, decode = row["encode_per_second"] / 1e6, row["decode_per_second"] / 1e6
        out.print(f"{100 * row['zeros']:.0f}% zeros, int4: encode {encode:.1f}, decode {decode:.1f} M weights/s")
    multiples = memory(10 << 20)
    out.print(f"peak memory / decoded tensor: {multiples}")
    call = first_call(tensors_front("digits").points[0].path)
    out.print(f"seconds of the first call in a fresh process: {call}")
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "real": models, "synthetic": made, "rates": speed, "memory": multiples, "first_call": call, "estimate": errors
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    out.print(f"raw numbers: {RESULTS}")


if __name__ == "__main__":
    main()
