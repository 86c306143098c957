"""Many workers, simulated: how long until the front of one worker is reached?

    python -m benchmarks.scaling [--task digits] [--trials 1000]

Trials are not run but predicted, by regression trees (extremely randomised, Geurts et al., 2006) over those that
`benchmarks.search` recorded: what a trial's accuracy lacks, its bytes over the profile's prediction, its seconds;
from its recipe and from its parent. The sampler is the real one, asked whenever one of 1, 8, 64 or 512 workers is free;
how well they predict trials that they have not seen is printed first. Writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import cross_val_predict

import autocompress as ac
from autocompress.agent.sampler import distributions
from autocompress.front import hypervolume
from autocompress.recipe import Choice
from autocompress.searching import profile as measure_profile
from benchmarks.search import DIGITS, RESULTS, TASKS, worst_accuracy

OUT = Path(__file__).parent / "results" / "scaling.json"
WORKERS = (1, 8, 64, 512)
_ABOVE = 0.003
"""Accuracy by which the ceiling of the logarithm lies above the best recorded one."""


@dataclass(frozen=True)
class Outcome:
    """Of a trial, recorded or predicted. accuracy: on the validation split."""

    size_bytes: float
    accuracy: float
    seconds: float


class Simulator:
    """Foretells trials of one task."""

    def __init__(self, profile: ac.Profile, runs: list[dict[str, Any]]) -> None:
        self.profile, self.base = profile, float(runs[0]["base"]["val"])
        trials = [trial for run in runs for trial in run["trials"] if trial]
        self.ceiling = max(self.base, *(trial[1] for trial in trials)) + _ABOVE
        x, y = [], []
        for run in runs:
            for trial in (t for t in run["trials"] if t):
                parent = None if trial[3] is None else run["trials"][trial[3]]
                chosen = self._decode(trial[4])
                before = None if parent is None else (self._decode(parent[4]), Outcome(*parent[:3]))
                x.append(self._features(chosen, before))
                ratio = math.log(trial[0] / profile.predict(chosen))
                y.append([math.log(self.ceiling - trial[1]), ratio, math.log(trial[2])])
        self._x, self._y = np.array(x), np.array(y)
        self._trees = ExtraTreesRegressor(100, min_samples_leaf=2, random_state=0, n_jobs=1).fit(self._x, self._y)

    def explained(self) -> list[float]:
        """Share of the variance of (what lacks, bytes, seconds), as logarithms, that is predicted of unseen trials."""
        predicted = cross_val_predict(self._trees, self._x, self._y, cv=5)
        return [float(1 - r) for r in (self._y - predicted).var(0) / self._y.var(0)]

    def _decode(self, chosen: str) -> dict[str, Choice]:
        return {d.key: d.choices[DIGITS.index(c)] for d, c in zip(self.profile.space, chosen, strict=True)}

    def _features(self, chosen: dict[str, Choice], parent: tuple[dict[str, Choice], Outcome] | None) -> list[float]:
        """Bytes and effects in all, how far each dimension goes on average, and the same of the step."""
        before, outcome = parent or (self.profile.default(), Outcome(0, self.base, 0))
        sizes = [math.log2(self.profile.predict(c)) for c in (chosen, before)]
        harms = [sum(e[str(c[key])] for key, e in self.profile.effects.items()) for c in (chosen, before)]
        levels: dict[str, list[float]] = {}
        for key, d in self.profile.dimensions.items():
            levels.setdefault(d.name, []).append(d.choices.index(chosen[key]) / len(d.choices))
        steps = [sizes[1] - sizes[0], harms[0] - harms[1], math.log(self.ceiling - outcome.accuracy)]
        means = [sum(places) / len(places) for places in levels.values()]
        return [parent is not None, sizes[0], math.log(harms[0] + 1e-4), *steps, *means]

    def __call__(self, chosen: dict[str, Choice], parent: tuple[dict[str, Choice], Outcome] | None) -> Outcome:
        lacking, ratio, seconds = self._trees.predict([self._features(chosen, parent)])[0]
        size = self.profile.predict(chosen) * math.exp(ratio)
        return Outcome(size, self.ceiling - math.exp(lacking), math.exp(seconds))


def simulate(simulator: Simulator, workers: int, trials: int) -> list[tuple[float, float, float]]:
    """(second of its end, bytes, accuracy) of every trial of a search, in the order in which they end."""
    profile = simulator.profile
    sampler = ac.FrontierSampler(profile, trials, simulator.base)
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    asked = distributions(profile.space)
    done: dict[int, tuple[dict[str, Choice], Outcome]] = {}
    busy: list[tuple[float, int]] = []
    running: dict[int, tuple[optuna.Trial, Outcome]] = {}
    out = []

    def begin(now: float) -> None:
        trial = study.ask(asked)
        outcome = simulator(trial.params, done.get(trial.user_attrs["parent"]))
        running[trial.number] = trial, outcome
        heapq.heappush(busy, (now + outcome.seconds, trial.number))

    for _ in range(min(workers, trials)):
        begin(0.0)
    while busy:
        now, number = heapq.heappop(busy)
        trial, outcome = running.pop(number)
        done[number] = trial.params, outcome
        study.tell(trial, [outcome.size_bytes, outcome.accuracy])
        out.append((now, outcome.size_bytes, outcome.accuracy))
        if len(out) + len(busy) < trials:
            begin(now)
    return out


def areas(ended: list[tuple[float, float, float]], base_bytes: float, worst: float) -> NDArray[np.float64]:
    """float64 [trials]: hypervolume when each has ended."""
    front: list[tuple[float, float]] = []
    out = []
    for _, size, accuracy in ended:
        front.append((size, accuracy))
        out.append(hypervolume(front, base_bytes, worst))
    return np.array(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with mnist/")
    parser.add_argument("--task", choices=[*TASKS], default="digits")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/benchmarks/search.md")
    parser.add_argument("--trials", type=int, default=1000)
    given = parser.parse_args()
    if given.data:
        os.environ["AUTOCOMPRESS_DATA"] = given.data
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    methods = ("frontier", "no-lineage", "no-profile", "nsga2-learning-rate")
    runs = [json.loads(path.read_text()) for m in methods for path in sorted(RESULTS.glob(f"{given.task}-{m}-*.json"))]
    out = Console(width=140)
    profile = measure_profile(TASKS[given.task])
    # a machine without arithmetic for a precision is offered one dimension less
    runs = [run for run in runs if all(t is None or len(t[4]) == len(profile.dimensions) for t in run["trials"])]
    simulator = Simulator(profile, runs)
    explained = simulator.explained()
    trials = sum(len(run["trials"]) for run in runs)
    out.print(f"from {trials} recorded trials; share of variance predicted of unseen ones: ", end="")
    out.print(", ".join(f"{n} {e:.2f}" for n, e in zip(("accuracy", "bytes", "seconds"), explained, strict=True)))
    worst = worst_accuracy(simulator.base)
    results: dict[str, Any] = {"task": given.task, "recorded_trials": trials, "explained": explained, "workers": {}}
    goal = whole = alone = 0.0
    for workers in WORKERS:
        ended = simulate(simulator, workers, given.trials)
        area = areas(ended, runs[0]["base_bytes"], worst)
        if workers == 1:
            goal, whole = 0.95 * area[-1], ended[-1][0]
        at = int(np.flatnonzero(area >= goal)[0]) if area[-1] >= goal else None
        seconds = math.inf if at is None else ended[at][0]
        alone = alone or seconds
        results["workers"][workers] = {
            "hypervolume": float(area[-1]),
            "seconds": ended[-1][0],
            "seconds_to_95_percent": None if at is None else seconds,
            "trials_to_95_percent": None if at is None else at + 1,
            "faster_than_one_worker": whole / seconds,
            "faster_than_one_worker_to_95_percent": alone / seconds,
        }
    look = MARKDOWN if given.markdown else HEAVY_HEAD
    shown = Table(title=f"{given.task}, {given.trials} simulated trials", title_justify="left", box=look)
    heads = ("seconds to 95%", "trials to 95%", "against one worker's run", "against one worker's 95%")
    for name in ("workers", "hypervolume", "seconds in all", *heads):
        shown.add_column(name, justify="right")
    for workers, r in results["workers"].items():
        reached = r["trials_to_95_percent"]
        speed = [f"1/{r[f'faster_than_one_worker{end}']:.0f}" if reached else "" for end in ("", "_to_95_percent")]
        took = f"{r['seconds_to_95_percent']:.0f}" if reached else "not reached"
        shown.add_row(str(workers), f"{r['hypervolume']:.3f}", f"{r['seconds']:.0f}", took, str(reached or ""), *speed)
    out.print(shown)
    known = json.loads(OUT.read_text()) if OUT.is_file() else {}
    OUT.write_text(json.dumps({**known, given.task: results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
