"""What a step of fine-tuning costs in each precision, and what it gives: time, memory, accuracy.

    python -m benchmarks.precision [--data ../shared/data] [--table]

On the GPU where there is one, else on the CPU: an original of each task, with all weights in 4 bits and half of
them pruned, is fine-tuned for so many steps in float32, bfloat16 and (on CUDA) float16 with a scaled loss.
Seconds are of the whole step, masks, distillation and price of bits included; bytes are the most that the steps
had on the device above what was there before, and what autograd keeps of a forward pass for the backward pass.
Writes benchmarks/results/precision.json, a row for each device; --table prints it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from autocompress.agent.preparation import trained
from autocompress.recipe import MODEL, Choice, Recipe
from autocompress.space import BoundSpace
from autocompress.task import fastest_device, load_task, measure, to_device
from autocompress.techniques.base import trainings
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune, step_costs
from autocompress.trial.workshop import Workshop

RESULTS = Path(__file__).parent / "results" / "precision.json"
TASKS = {"digits": "digits", "lenet5": "benchmarks.tasks:lenet5_short", "wide": "benchmarks.tasks:wide_rows"}
STEPS = 96


def measured(name: str, device: str) -> list[dict[str, Any]]:
    task = load_task(TASKS[name])
    on_gpu, place = device == "cuda", torch.device(device)
    batches = [to_device(batch, place) for batch in itertools.islice(task.batches("train"), STEPS)]
    train = list(itertools.islice(itertools.cycle(batches), STEPS))
    task = replace(task, train=train, val=to_device(task.val, place))
    original = trained(task, 0)
    rows = []
    for precision in map(str, trainings()["precision"].examples()):
        if not trainings()["precision"].available(precision):
            continue
        workshop = Workshop(task, original, BoundSpace(()), Path(), 0, device)
        chosen: dict[str, Choice] = {f"{MODEL}:precision": precision, f"{MODEL}:rate_penalty": 0.25}
        for layer in workshop.anatomy.layers:
            chosen |= {f"{layer.name}:weights": "int4", f"{layer.name}:sparsity": 0.5}
        for _ in range(2):  # the first chooses its kernels
            torch.manual_seed(0)
            candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(chosen), workshop.calibration)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_gpu else 0
            began = time.perf_counter()
            for _epoch in fine_tune(task, candidate, workshop.original, 1):
                pass
            if on_gpu:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / STEPS
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        costs = step_costs(candidate, workshop.calibration)
        rows.append(
            {
                "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
                "task": name,
                "precision": precision,
                "step_seconds": seconds,
                "peak_bytes": peak,
                "saved_bytes": costs[precision]["saved_bytes"] if costs else None,
                "val": measure(task, candidate.model, "val"),
                "original_val": measure(task, workshop.original, "val"),
            }
        )
        if costs:
            rows[0]["saved_bytes"] = costs["float32"]["saved_bytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=MARKDOWN)
    for column in ("device", "task", "precision", "step, ms", "peak, MB", "kept for backward, MB", "val", "original"):
        shown.add_column(column)
    for r in rows:
        cells = [f"{1e-6 * r[k]:.1f}" if r[k] is not None else "" for k in ("peak_bytes", "saved_bytes")]
        accuracies = [f"{r[k]:.4f}" for k in ("val", "original_val")]
        shown.add_row(r["device"], r["task"], r["precision"], f"{1000 * r['step_seconds']:.1f}", *cells, *accuracies)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with mnist/")
    parser.add_argument("--task", choices=[*TASKS], action="append")
    parser.add_argument("--table", action="store_true", help="print the results there are")
    given = parser.parse_args()
    if given.data:
        os.environ["AUTOCOMPRESS_DATA"] = given.data
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for name in [] if given.table else given.task or TASKS:
        rows = measured(name, fastest_device())
        known = [r for r in known if (r["task"], r["device"]) != (name, rows[0]["device"])] + rows
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    Console(width=150).print(table(known))


if __name__ == "__main__":
    main()
