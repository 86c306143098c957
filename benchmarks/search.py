"""Frontier search against Optuna's samplers: the same trials, the same fine-tuning, the same reference point.

    python -m benchmarks.search [--data ../shared/data] [--task digits] [--only METHOD ...] [--seeds 5] [--trials N]
    python -m benchmarks.search --table | --markdown | --plot FILE

Every method proposes recipes of the same space; a trial is `Workshop.finish` for all of them, of the same number of
epochs. Optuna's samplers start every trial from the original's weights, at the task's own learning rate, which
`nsga2-learning-rate` may choose, too, and without transforms, which `nsga2-transform` has as well. Ours knows its
budget: it has a run of 10, one of 25 and one of 50 trials.
Ablations of ours: `no-lineage` (every trial starts from the original too), `no-rate` (no price of bits), `no-race` (the
task's own learning rate), `no-profile` (every step of a dimension is thought to do the same harm), `no-forecast`
(nothing is learned from parents and children), `no-transform` (weights are pruned and stored as they are). Ours with a
size to meet is `max-size`, with an accuracy to keep `min-accuracy`, in the space of every technique `everything` (all
others: `default`).

Hypervolume is that of log2 bytes x accuracy over the reference point: the bytes of the original's float32 file, and
an error of twice the original's plus 5 points. One process a core; each finished job is a file in
benchmarks/results/search/, which is not run again: stop and go on at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from matplotlib.figure import Figure
from optuna.samplers import BaseSampler
from rich.box import HEAVY_HEAD, MARKDOWN, Box
from rich.console import Console
from rich.table import Table

import autocompress as ac
from autocompress.agent.acquisition import Region
from autocompress.agent.candidate import Point
from autocompress.agent.forecast import Forecast
from autocompress.agent.preparation import trained
from autocompress.agent.profile_cache import measured_profile
from autocompress.agent.sampler import distributions
from autocompress.agent.samplers import make_sampler
from autocompress.artifact import load
from autocompress.chance import chance_accuracy
from autocompress.files import ARTIFACT
from autocompress.front import Base, hypervolume, non_dominated
from autocompress.model.surgery import tensors
from autocompress.task import load_task, measure

RESULTS = Path(__file__).parent / "results" / "search"
TASKS = {
    "digits": "benchmarks.tasks:digits_short",
    "lenet_300_100": "benchmarks.tasks:lenet_300_100_short",
    "digit_rows": "benchmarks.tasks:digit_rows_short",
}
RATIOS = {"digits": 150, "lenet_300_100": 250, "digit_rows": 40}
"""Of the original's bytes over those that `max-size` is asked for, and that accuracies are compared at."""
LOST = 0.01
"""Accuracy that files may lose that `min-accuracy` is asked for, and whose bytes are compared."""
BUDGET, LONG = 50, 400
DIGITS = string.digits + string.ascii_lowercase
"""How the choice of a dimension is recorded: its place among the dimension's choices."""
AT = (10, 25, 50, 200, 400, 1000)


Method = Callable[[ac.Profile, int, Base, int, float], BaseSampler]
"""(profile, trials, the original, seed, bytes for `max-size`) -> a sampler."""


def _optuna(make: Callable[[int], BaseSampler]) -> Method:
    return lambda profile, budget, base, seed, size: make(seed)


def _frontier(profile: ac.Profile, budget: int, base: Base, seed: int, size: float) -> BaseSampler:
    return make_sampler("frontier", profile, budget, base, seed, None, None)


def _without_profile(profile: ac.Profile, budget: int, base: Base, seed: int, size: float) -> BaseSampler:
    assert "effect_table" not in vars(profile), "made from what is changed here"
    for key, dimension in profile.dimensions.items():
        profile.effects[key] = {str(choice): 0.01 * i for i, choice in enumerate(dimension.choices)}
    return _frontier(profile, budget, base, seed, size)


class _Unlearning(ac.FrontierSampler):
    """Goes on believing what it believed before the first trial."""

    def _forecast(self, done: Sequence[Point], region: Region) -> Forecast:
        return super()._forecast([], region)


METHODS: dict[str, Method] = {
    "frontier": _frontier,
    "random": _optuna(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "tpe": _optuna(lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True)),
    "nsga2": _optuna(lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20)),
    "nsga2-learning-rate": _optuna(lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20)),
    "nsga2-transform": _optuna(lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20)),
    "gp": _optuna(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "no-lineage": _frontier,
    "no-rate": _frontier,
    "no-race": _frontier,
    "no-profile": _without_profile,
    "no-forecast": lambda profile, budget, base, seed, size: _Unlearning(
        profile, budget, base.val_accuracy, seed, chance_accuracy=base.chance_accuracy
    ),
    "no-transform": _frontier,
    "everything": _frontier,
    "max-size": lambda profile, budget, base, seed, size: make_sampler(
        "frontier", profile, budget, base, seed, size, None
    ),
    "min-accuracy": lambda profile, budget, base, seed, size: make_sampler(
        "frontier", profile, budget, base, seed, None, base.val_accuracy - LOST
    ),
}
OPTUNA = ("random", "tpe", "nsga2", "nsga2-learning-rate", "nsga2-transform", "gp")
DEFAULT = [m for m in METHODS if m not in ("nsga2", "nsga2-transform", "no-race", "everything", "min-accuracy")]
"""Without those that would make it more than four hours on two cores; `nsga2-learning-rate` differs from `nsga2` by the
learning rate."""
LONG_METHODS = {"digits": "tpe", "lenet_300_100": "nsga2-learning-rate", "digit_rows": "nsga2-learning-rate"}
LONG_SEEDS = 2
"""Run to 400 trials, by so many of the seeds: those of Optuna's that were the best there or as good, when three ran."""
LONGEST, LONGEST_RUN = 1000, ("lenet_300_100", "nsga2-learning-rate", 0)
"""Trials of the one longest run, and its task, method and seed."""
Job = tuple[str, str, int, int]
"""(task, method, seed, trials)."""


def space_for(method: str) -> ac.SearchSpace:
    space = ac.SearchSpace.named("everything" if method == "everything" else "default")
    without = {"no-rate": "rate_penalty"} | dict.fromkeys(
        {"no-race", *OPTUNA} - {"nsga2-learning-rate", "nsga2-transform"}, "learning_rate"
    )
    left = {name: choices for name, choices in space.training.items() if name != without.get(method)}
    rules = space.rules
    if method in {"no-transform", *OPTUNA} - {"nsga2-transform"}:
        rules = tuple((at, {name: c for name, c in rule.items() if name != "transform"}) for at, rule in rules)
    return replace(space, training=left, rules=rules)


def run_job(job: Job) -> int:
    """One method, one seed, one task; all trials, whose number is returned, in this process."""
    task_name, method, seed, budget = job
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = load_task(TASKS[task_name])
    model = trained(task, seed=0)
    folder = Path(tempfile.mkdtemp(prefix="bench-search-"))
    try:
        given = replace(task, model=model, pretrain=None)
        workshop = ac.Workshop.on(given, space_for(method), folder, seed)
        profile = ac.Profile(workshop.space, workshop.anatomy, measured_profile(workshop))
        base = Base(
            sum(t.numel() * t.element_size() for t in tensors(workshop.original).values()),
            measure(given, workshop.original, "val"),
            measure(given, workshop.original, "test"),
            chance_accuracy(workshop.calibration, workshop.original),
        )
        sampler = METHODS[method](profile, budget, base, seed, base.size_bytes / RATIOS[task_name])
        study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
        asked = distributions(workshop.space)
        trials: list[list[Any] | None] = []
        proposing = []
        for _ in range(budget):
            began = time.perf_counter()
            trial = study.ask(asked)
            proposing.append(time.perf_counter() - began)
            parent = None if method == "no-lineage" else trial.user_attrs.get("parent")
            try:
                result = workshop.finish(trial.number, workshop.space.recipe(trial.params), parent)
            except ac.AutocompressError:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                trials.append(None)
                continue
            trial.set_user_attr("effects", result.effects)
            trial.set_user_attr("reached", result.reached)
            study.tell(trial.number, [result.size_bytes, result.val_accuracy])
            chosen = "".join(DIGITS[d.choices.index(trial.params[d.key])] for d in workshop.space)
            trials.append([result.size_bytes, result.val_accuracy, round(result.seconds, 3), parent, chosen])
        front = []
        done = [(i, t) for i, t in enumerate(trials) if t]
        for at in non_dominated([(t[0], t[1]) for _, t in done]):
            number, (size, val, *_) = done[at]
            path = folder / "trials" / str(number) / ARTIFACT
            front.append([number, size, val, measure(given, load(path, given.build), "test")])
        write(
            path_of(job),
            {
                "job": job,
                "base_bytes": base.size_bytes,
                "base": {"val": base.val_accuracy, "test": base.test_accuracy},
                "trials": trials,
                "front": front,
                "proposing_seconds": proposing,
            },
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return budget


def path_of(job: Job) -> Path:
    task, method, seed, budget = job
    return RESULTS / f"{task}-{method}-{budget}-{seed}.json"


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(data) + "\n")
    path.with_suffix(".new").replace(path)


def worst_accuracy(base: float) -> float:
    """Of the reference point: an error of twice the original's plus 5 points."""
    return 1 - (2 * (1 - base) + 0.05)


def area(result: dict[str, Any], count: int) -> float:
    """Hypervolume of the first `count` trials."""
    points = [(t[0], t[1]) for t in result["trials"][:count] if t]
    return hypervolume(points, result["base_bytes"], worst_accuracy(result["base"]["val"]))


def accuracy(result: dict[str, Any], count: int) -> float:
    """The best on the validation split among the first `count` trials, of files of at most a stated size."""
    limit = result["base_bytes"] / RATIOS[result["job"][0]]
    return max((t[1] for t in result["trials"][:count] if t and t[0] <= limit), default=0.0)


def fewest(result: dict[str, Any], count: int) -> float:
    """Bytes of the smallest among the first `count` trials that loses at most `LOST` on the validation split; the
    original's where there is none."""
    least = result["base"]["val"] - LOST
    return float(min((t[0] for t in result["trials"][:count] if t and t[1] >= least), default=result["base_bytes"]))


def budgets(task: str, method: str, seed: int) -> tuple[int, ...]:
    """Trials of each run. Ours knows its budget, so it has a run for each; Optuna's samplers do not, and have one of
    the longest. What is neither has one seed."""
    if method == "frontier":
        return AT[:3]
    if (task, method, seed) == LONGEST_RUN:
        return (LONGEST,)
    if method == LONG_METHODS[task] and seed < LONG_SEEDS:
        return (LONG,)
    return (BUDGET,) if method in OPTUNA or seed == 0 else ()


def jobs(tasks: list[str], methods: list[str], seeds: int, trials: int | None = None) -> list[Job]:
    """trials: of each run, instead of what `budgets` says."""
    runs = itertools.product(range(seeds), tasks, methods)
    lengths = (lambda *run: (trials,)) if trials else budgets
    return [(task, method, seed, budget) for seed, task, method in runs for budget in lengths(task, method, seed)]


def recorded(task: str, method: str, count: int) -> list[dict[str, Any]]:
    """The runs that tell what a method reaches with `count` trials, of each seed the longest."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{task}-{method}-[0-9]*.json"))]
    told = [r for r in runs if r["job"][3] == count or (r["job"][3] > count and method in OPTUNA)]
    return [*{r["job"][2]: r for r in sorted(told, key=lambda r: r["job"][3])}.values()]


def table(
    title: str, tasks: list[str], measured: Callable[[dict[str, Any], int], float], look: Box, form: str = ".3f"
) -> Table:
    shown = Table(title=title, title_justify="left", box=look)
    for name in ("task", "method", *(f"@{count}" for count in AT), "proposal, ms"):
        shown.add_column(name, justify="left" if name in ("task", "method") else "right")
    for task, method in itertools.product(tasks, METHODS):
        cells = []
        for count in AT:
            found = [measured(run, count) for run in recorded(task, method, count)]
            cells.append(f"{statistics.median(found):{form}} ({len(found)})" if found else "")
        if not any(cells):
            continue
        took = [seconds for run in recorded(task, method, BUDGET) for seconds in run["proposing_seconds"][40:50]]
        shown.add_row(task, method, *cells, f"{1000 * statistics.median(took):.0f}" if took else "")
    return shown


def draw(tasks: list[str], path: Path) -> None:
    """Hypervolume over trials, a panel for each task: the median run of each method's longest budget."""
    figure = Figure(figsize=(4 * len(tasks), 3.4), layout="constrained")
    lines = {}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for place, method in enumerate(("frontier", *OPTUNA)):
            longest = max((count for count in AT if recorded(task, method, count)), default=None)
            if longest:
                runs = [[area(run, n + 1) for n in range(longest)] for run in recorded(task, method, longest)]
                middle = [statistics.median(at) for at in zip(*runs, strict=True)]
                look = {"color": f"C{place}", "lw": 1 if place else 2}
                (lines[method],) = axes.plot(range(1, longest + 1), middle, **look)
        axes.set(xscale="log", xlabel="trials", title=task, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("hypervolume")
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with mnist/")
    parser.add_argument("--task", choices=[*TASKS], action="append")
    parser.add_argument("--only", nargs="*", choices=[*METHODS], metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, help="of each run (by default as many as the tables need)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="print the results there are")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results there are (.png, .svg)")
    parser.add_argument("--markdown", action="store_true", help="the same, for docs/benchmarks/search.md")
    given = parser.parse_args()
    if given.data:
        os.environ["AUTOCOMPRESS_DATA"] = given.data
    out = Console(width=140)
    tasks = given.task or [*TASKS]
    if given.plot:
        draw(tasks, given.plot)
    if not (given.table or given.markdown or given.plot):
        wanted = [
            job for job in jobs(tasks, given.only or DEFAULT, given.seeds, given.trials) if not path_of(job).is_file()
        ]
        trials = left = sum(job[3] for job in wanted)
        began = time.monotonic()
        with multiprocessing.get_context("spawn").Pool(given.workers, maxtasksperchild=1) as pool:
            for number, ran in enumerate(pool.imap_unordered(run_job, wanted), 1):
                left -= ran
                hours = (time.monotonic() - began) / 3600 * left / (trials - left)
                clock = time.strftime("%H:%M:%S")
                out.print(f"{clock} {number}/{len(wanted)} jobs, about {hours:.1f} h left", highlight=False)
    look = MARKDOWN if given.markdown else HEAVY_HEAD
    out.print(table("median hypervolume (number of runs)", tasks, area, look))
    at = ", ".join(f"1/{RATIOS[task]} ({task})" for task in tasks)
    out.print(table(f"median best validation accuracy at {at} of the bytes", tasks, accuracy, look))
    out.print(table(f"median fewest bytes at a loss of at most {LOST:g}", tasks, fewest, look, ",.0f"))


if __name__ == "__main__":
    main()
