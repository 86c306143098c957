"""Compression without training: layers fitted to what the original's say, against the same search that only rounds.

    python -m benchmarks.post_training --data ../shared/data [--task digits]

Searches of 50 trials of no epochs, seed 0, each in this process. *rounded*: weights are pruned by magnitude and rounded
to the nearest, all else is the same. *trained*: the search of `benchmarks.search` that fine-tunes, where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import torch

import autocompress as ac
from autocompress.agent.preparation import trained
from autocompress.agent.sampler import distributions
from autocompress.agent.samplers import make_sampler
from autocompress.artifact import load
from autocompress.chance import chance_accuracy
from autocompress.files import ARTIFACT
from autocompress.front import Base, non_dominated
from autocompress.model.surgery import tensors
from autocompress.space import BoundSpace
from autocompress.task import load_task, measure

TASKS = {
    "digits": "benchmarks.tasks:digits_short",
    "lenet_300_100": "benchmarks.tasks:lenet_300_100_short",
    "lenet5": "benchmarks.tasks:lenet5_short",
    "digit_rows": "benchmarks.tasks:digit_rows_short",
    "shakespeare": "benchmarks.language:shakespeare",
}
RESULTS = Path(__file__).parent / "results" / "post_training.json"
TRAINED = Path(__file__).parent / "results" / "search"
TRIALS, LOST = 50, (0.005, 0.01, 0.02)


def searched(name: str, fitted: bool) -> dict[str, Any]:
    given = replace(load_task(TASKS[name]), epochs=0)
    given = replace(given, model=trained(given, seed=0), pretrain=None)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="bench-post-training-") as folder,
        nullcontext() if fitted else mock.patch("autocompress.trial.workshop.reconstruct"),
    ):
        workshop = ac.Workshop.on(given, ac.SearchSpace.named("default"), Path(folder))
        if not fitted:  # the nearest has no price
            workshop.space = BoundSpace(tuple(d for d in workshop.space if d.name != "rate_penalty"))
        profile = ac.Profile(workshop.space, workshop.anatomy, workshop.base_profile())
        base = Base(
            sum(t.numel() * t.element_size() for t in tensors(workshop.original).values()),
            measure(given, workshop.original, "val"),
            measure(given, workshop.original, "test"),
            chance_accuracy(workshop.calibration, workshop.original),
        )
        sampler = make_sampler("frontier", profile, TRIALS, base, 0, None, None, trains=False)
        study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
        for _ in range(TRIALS):
            trial = study.ask(distributions(workshop.space))
            result = workshop.finish(trial.number, workshop.space.recipe(trial.params))
            trial.set_user_attr("effects", result.effects)
            trial.set_user_attr("reached", result.reached)
            study.tell(trial, [result.size_bytes, result.val_accuracy])
        seconds = time.monotonic() - began
        values = [(t.values[0], t.values[1]) for t in study.trials]
        front = []
        for number in non_dominated(values):
            decoded = load(workshop.trial_folder(number) / ARTIFACT, given.build)
            front.append([number, *values[number], measure(given, decoded, "test")])
    return {
        "task": name,
        "way": "fitted" if fitted else "rounded",
        "base_bytes": base.size_bytes,
        "base": {"val": base.val_accuracy, "test": base.test_accuracy},
        "front": front,
        "seconds": round(seconds, 1),
    }


def fine_tuned(name: str) -> dict[str, Any] | None:
    path = TRAINED / f"{name}-frontier-{TRIALS}-0.json"
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    seconds = sum(t[2] for t in known["trials"] if t)
    return {**known, "task": name, "way": "trained", "seconds": round(seconds, 1)}


def markdown(results: list[dict[str, Any]]) -> str:
    heads = [f"at {100 * lost:g} | test" for lost in LOST]
    lines = [f"| task | | {' | '.join(heads)} | seconds |", "| --- | --- |" + " --- | --- |" * len(LOST) + " --- |"]
    for r in results:
        cells = []
        for lost in LOST:
            fit = [p for p in r["front"] if p[2] >= r["base"]["val"] - lost - 1e-9]
            best = min(fit, key=lambda p: p[1], default=None)
            ratio = f"{best[1]:,.0f} (1/{r['base_bytes'] / best[1]:.0f}) | {best[3]:.4f}" if best else "- | "
            cells.append(ratio)
        lines.append(f"| {r['task']} | {r['way']} | {' | '.join(cells)} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with mnist/ and tinyshakespeare/")
    parser.add_argument("--task", choices=[*TASKS], action="append")
    parser.add_argument("--markdown", action="store_true", help="only print the table of what was measured")
    given = parser.parse_args()
    if given.data:
        os.environ["AUTOCOMPRESS_DATA"] = given.data
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in () if given.markdown else given.task or TASKS:
        for fitted in (True, False):
            result = searched(name, fitted)
            results = [r for r in results if (r["task"], r["way"]) != (name, result["way"])] + [result]
            RESULTS.write_text(json.dumps(results) + "\n")
            print(name, result["way"], f"{result['seconds']:.0f} s", flush=True)
    tuned = [r for r in map(fine_tuned, TASKS) if r]
    print(markdown(sorted([*results, *tuned], key=lambda r: ([*TASKS].index(r["task"]), r["way"] == "trained"))))


if __name__ == "__main__":
    main()
