"""What a proposal costs: the controller's time with many finished trials and a large model.

    python -m benchmarks.proposals

A made-up model of 200 layers (8 sparsities x 8 bit widths each, a group of channels for every two), its effects and
bytes by formula; finished trials are random recipes, told by formula too, in Optuna's memory and, the first 50, in a
run's journal. Prints the median time of ten proposals, what of it is the sampler's (the rest is Optuna's, which keeps
500 parameters a trial), and that of a plan alone (also for 1,000 layers of 100 choices), and writes
benchmarks/results/proposals.json.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna

import autocompress as ac
from autocompress.agent.planner import plan
from autocompress.agent.sampler import distributions
from autocompress.agent.study import SearchStudy
from autocompress.model.anatomy import Anatomy, Layer
from autocompress.space import BoundDimension, BoundSpace

RESULTS = Path(__file__).parent / "results" / "proposals.json"
COUNTS = (50, 1000, 10_000)


def made_up(layers: int, sparsities: int, widths: int) -> ac.Profile:
    rng = np.random.default_rng(0)
    dims: list[BoundDimension] = []
    effects: dict[str, dict[str, float]] = {}
    table: dict[str, dict[str, float]] = {}
    made = []
    for i in range(layers):
        size, tender = rng.uniform(1e3, 1e5), rng.uniform(0.001, 0.1)
        for name, count in (("sparsity", sparsities), ("weights", widths)):
            choices = tuple(f"{name}{c}" for c in range(count))
            dims.append(BoundDimension(f"l{i}", name, choices, choices[0]))
            effects[f"l{i}:{name}"] = {c: tender * k**2 * rng.uniform(0.5, 1.5) for k, c in enumerate(choices)}
        every = itertools.product(range(sparsities), range(widths))
        table[f"l{i}"] = {f"sparsity{s}|weights{w}": size * 0.7**s * (1 - w / (widths + 1)) for s, w in every}
        made.append(Layer(f"l{i}", f"l{i}.weight", (100, 100), "Linear", ((f"l{i - i % 2}", 1.0),)))
        if i % 2 == 0:
            dims.append(BoundDimension(f"l{i}", "channels", (1.0, 0.7, 0.5, 0.25), 1.0))
            effects[f"l{i}:channels"] = {"1.0": 0.0, "0.7": tender, "0.5": 2 * tender, "0.25": 8 * tender}
    anatomy = Anatomy(tuple(made), (), {}, (), ((10, ()),))
    measured = {"effects": effects, "layer_bytes": table, "weights_left": {}, "vector_bytes": {"float32": 40.0}}
    return ac.Profile(BoundSpace(tuple(dims)), anatomy, {**measured, "header_bytes": 1000.0})


class _Timed(ac.FrontierSampler):
    """Tells how long it took."""

    seconds = 0.0

    def next(self, study: optuna.Study, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        began = time.perf_counter()
        try:
            return super().next(study, number)
        finally:
            self.seconds = time.perf_counter() - began


def proposals(profile: ac.Profile, folder: Path | None = None) -> dict[int, list[tuple[float, float]]]:
    """Number of finished trials -> (seconds, of them the sampler's) of the ten proposals that follow.

    folder: of a run, whose journal keeps the trials.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = _Timed(profile, 2 * max(COUNTS), 0.99)
    run = SearchStudy(folder, profile.space, 2 * max(COUNTS), sampler) if folder else None
    study = run.study if run else optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    asked = distributions(profile.space)
    rng = np.random.default_rng(0)

    def values(chosen: dict[str, Any]) -> list[float]:
        harm = sum(profile.effects[key][str(choice)] for key, choice in chosen.items())
        return [profile.predict(chosen) * 0.9, 0.99 - 0.5 * harm / (100 + harm)]

    out = {}
    for count in COUNTS[:1] if run else COUNTS:
        while len(study.get_trials(deepcopy=False)) < count:
            heavy = rng.uniform(0, 1)
            chosen = {key: d.choices[rng.binomial(len(d.choices) - 1, heavy)] for key, d in profile.dimensions.items()}
            study.add_trial(optuna.create_trial(params=chosen, distributions=asked, values=values(chosen)))
        took = []
        for _ in range(10):
            began = time.perf_counter()
            trial = run.ask() if run else study.ask(asked)
            took.append((time.perf_counter() - began, sampler.seconds))
            assert trial
            study.tell(trial.number, values(study.get_trials(deepcopy=False)[trial.number].params))
        out[count] = took
    return out


def main() -> None:
    results: dict[str, Any] = {}
    for layers, options in ((200, 8), (1000, 10)):
        profile = made_up(layers, options, options)
        began = time.perf_counter()
        allowed = {d.key: d.choices for d in profile.space}
        plan(profile, profile.effect_table, 0.1 * profile.predict(profile.default()), profile.default(), allowed)
        results[f"plan, {layers} layers x {options * options} choices, seconds"] = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        for where, at in (("memory", None), ("a run's journal", Path(folder))):
            for number, seconds in proposals(made_up(200, 8, 8), at).items():
                whole, own = (statistics.median(took) for took in zip(*seconds, strict=True))
                results[f"proposal after {number} trials in {where}, 200 layers, seconds"] = whole
                results[f"of them the sampler's, {number} trials in {where}"] = own
    for name, seconds in results.items():
        print(f"{name}: {seconds:.4f}")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
