"""The search as a Python function."""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from autocompress.agent.controller import Controller
from autocompress.agent.preparation import PROFILING, Listener, Preparation, Progress, trained
from autocompress.agent.profile import Profile
from autocompress.agent.profile_cache import measured_profile
from autocompress.agent.run_config import read_config, write_config
from autocompress.agent.run_folder import create_run, existing_run
from autocompress.agent.samplers import check_sampler
from autocompress.agent.study import JOURNAL
from autocompress.durations import parse_duration
from autocompress.errors import RunError, TargetError
from autocompress.front import ParetoFront
from autocompress.report.live import LiveView
from autocompress.sizes import parse_size
from autocompress.space import SearchSpace
from autocompress.task import Task, check_task, fastest_device, load_task
from autocompress.trial.workshop import Workshop

Sampler = Literal["frontier", "tpe", "nsga2", "gp", "random"]
_BUDGET = 50


def search(
    task: Task | str,
    budget: int | None = None,
    space: SearchSpace | str | Path = "default",
    *,
    time_budget: str | float | None = None,
    epochs: int | None = None,
    seed: int = 0,
    run: str | Path | None = None,
    workers: int | None = None,
    sampler: Sampler = "frontier",
    max_size: str | int | None = None,
    min_accuracy: float | None = None,
    address: str | None = None,
    listener: Listener | None = None,
    quiet: bool = False,
) -> ParetoFront:
    """Search the joint space of `task` and return the front of size and accuracy.

    budget: length of the search in whole trials; one that is stopped halfway counts half. By default 50, or
    with `time_budget` as many as fit. time_budget: seconds, "30m" or "1h30m"; no trial but the first begins that
    would end later. epochs: of fine-tuning a trial, the task's by default; 0 compresses without training
    (docs/tasks.md). run: name (under `runs/`) or path of the run folder; a new one by default. workers: trials at a
    time; by default one per CPU core, or per GPU. max_size: "20KB", "1.5MiB" or bytes, and min_accuracy:
    validation accuracy; both focus the search. address: of a Ray cluster to run trials on, "auto" or "host:port", whose
    nodes share the run folder; by default a private Ray on this machine. listener: is called after every step; by
    default a view on stderr, or nothing if `quiet`. The same seed with one worker and a budget in trials gives the same
    front on the same kind of processor.

    Raises AutocompressError when anything that was asked for cannot be done; trials that fail do not.
    """
    given = _with_epochs(load_task(task) if isinstance(task, str) else task, epochs)
    _check_budget(budget, workers)
    check_sampler(sampler)
    seconds = None if time_budget is None else parse_duration(time_budget)
    limit = None if max_size is None else parse_size(max_size)
    rules = space if isinstance(space, SearchSpace) else SearchSpace.named(space)
    settings = {
        "task": given.name,
        "budget": budget or _BUDGET,
        "paced": budget is None and seconds is not None,
        "time_budget_seconds": seconds,
        "epochs": given.epochs,
        "seed": seed,
        "workers": workers,
        "sampler": sampler,
        "max_size_bytes": limit,
        "min_accuracy": min_accuracy,
    }
    folder = create_run(run, given.name)
    with _told(listener, quiet) as told:
        try:
            prepared = Preparation(folder, given, rules, settings, told, isinstance(task, str), address)
            write_config(folder, rules, settings)
        except BaseException:
            if not (folder / JOURNAL).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return _run(prepared)


def resume(
    run: str | Path,
    *,
    task: Task | None = None,
    budget: int | None = None,
    time_budget: str | float | None = None,
    workers: int | None = None,
    address: str | None = None,
    listener: Listener | None = None,
    quiet: bool = False,
) -> ParetoFront:
    """Go on with a run after a crash, a kill, or with a larger `budget`; finished trials are kept.

    time_budget: of what is to come; by default that of the run. task: needed when the run was started with a Task
    object instead of a name. address, listener, quiet: as in `search`; where a run goes on need not be where it began.
    """
    _check_budget(budget, workers)
    folder = existing_run(run)
    rules, settings = read_config(folder)
    if task is None and settings["task"] == "custom":
        raise RunError(f"run {str(folder)!r} was started with a Task object: pass task= to resume it")
    given = _with_epochs(task or load_task(settings["task"]), settings.get("epochs"))
    settings |= {"budget": budget or settings["budget"], "workers": workers or settings["workers"]}
    if budget is not None:
        settings |= {"paced": False, "time_budget_seconds": None}
    if time_budget is not None:
        settings |= {"paced": budget is None, "time_budget_seconds": parse_duration(time_budget)}
    with _told(listener, quiet) as told:
        return _run(Preparation(folder, given, rules, settings, told, task is None, address))


def profile(
    task: Task | str,
    space: str | Path | SearchSpace = "default",
    *,
    seed: int = 0,
    listener: Listener | None = None,
    quiet: bool = False,
) -> Profile:
    """What every choice of `space` alone does to the task's trained model, measured without training.

    A search measures the same before its first trial. listener, quiet: as in `search`. Raises AutocompressError for a
    task or a space that cannot be used.
    """
    given = load_task(task) if isinstance(task, str) else task
    rules = space if isinstance(space, SearchSpace) else SearchSpace.named(space)
    began = time.monotonic()
    with _told(listener, quiet) as told:

        def tell(phase: str) -> None:
            told(Progress(phase, Path(), seconds=time.monotonic() - began))

        model = trained(given, seed, tell)
        check_task(given, model)
        tell("reading the model")
        workshop = Workshop(given, model, rules, Path(), seed, fastest_device())
        measured = measured_profile(
            workshop, lambda: workshop.base_profile(lambda share: tell(f"{PROFILING}: {100 * share:.0f}%"))
        )
        return Profile(workshop.space, workshop.anatomy, measured)


def _run(prepared: Preparation) -> ParetoFront:
    try:
        return Controller(prepared).run()
    finally:
        prepared.cluster.close()


def _told(listener: Listener | None, quiet: bool) -> AbstractContextManager[Listener]:
    return nullcontext(listener) if listener else LiveView(Console(stderr=True), shown=not quiet)


def _with_epochs(task: Task, epochs: int | None) -> Task:
    """The task with trials of so many epochs, or its own."""
    if epochs is not None and epochs < 0:
        raise TargetError(f"epochs {epochs} is not enough: give 0, for no training, or more")
    return task if epochs is None else replace(task, epochs=epochs)


def _check_budget(budget: int | None, workers: int | None) -> None:
    if budget is not None and budget < 1:
        raise TargetError(f"budget {budget} is not enough: give at least 1 trial")
    if workers is not None and workers < 1:
        raise TargetError(f"workers {workers} is not enough: give at least 1")
