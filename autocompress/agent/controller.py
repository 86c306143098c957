"""The search: sets up a run and feeds the engine."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.trial import TrialState
from safetensors.torch import load_file, save
from torch import nn

import autocompress.techniques  # noqa: F401  (registers the techniques)
from autocompress.agent import engine
from autocompress.agent.pace import Pace
from autocompress.agent.payload import payload
from autocompress.agent.profile import Profile
from autocompress.agent.profile_cache import measured_profile
from autocompress.agent.results import Results
from autocompress.agent.run_folder import BASE, LOG, PROFILE
from autocompress.agent.sampler import FrontierSampler
from autocompress.agent.samplers import make_sampler
from autocompress.agent.scheduler import is_dominated
from autocompress.agent.study import SearchStudy
from autocompress.chance import chance_accuracy
from autocompress.errors import TargetError
from autocompress.files import write_file
from autocompress.front import Base, ParetoFront, format_accuracy
from autocompress.probing import MANY_PROBES, needed_choices
from autocompress.reparametrization import plain
from autocompress.sizes import format_size
from autocompress.space import SearchSpace
from autocompress.surgery import assign, tensors
from autocompress.task import Task, check_task, fastest_device, measure
from autocompress.trial import Rung, TrialResult, TrialSpec, Workshop, seed_everything

_MANY = 1_000_000
PROFILING = "profiling every choice"
WORTH_WORKERS = 10
"""Seconds that a profile takes at least, for workers to be started to measure it."""
_PROFILING = 0.25
"""Share of the time that is left which the profile may take."""
MAX_FRUITLESS = 3
"""Tune runs in a row that may end without a finished trial before the search gives up."""
HOPELESS = 8
"""Trials that may fail, before any has finished, before the search gives up."""


@dataclass(frozen=True)
class Progress:
    """What a listener is told: after every step of a search."""

    phase: str
    folder: Path
    done: float = 0
    failed: int = 0
    budget: int = 0
    seconds: float = 0.0
    base: Base | None = None
    points: tuple[tuple[int, float], ...] = ()


Listener = Callable[[Progress], object]


def trained(task: Task, seed: int, tell: Callable[[str], None] = lambda phase: None) -> nn.Module:
    """The original: the task's model, trained now when the task can."""
    seed_everything(seed)
    model = task.as_given()
    if task.pretrain is not None:
        tell("training the original model")
        task.pretrain(model)
    return plain(model)


class Controller:
    """One run. Implements the engine's Supply; knows studies and files, but no layer of torch."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        rules: SearchSpace,
        settings: dict[str, Any],
        listener: Listener | None,
        named: bool,
        address: str | None = None,
    ) -> None:
        self.folder, self.task, self.rules, self.settings = folder, task, rules, settings
        self.listener = listener
        self.named = named
        self.seed = int(settings["seed"])
        self.budget = int(settings["budget"])
        self.began = time.monotonic()
        self.pace = Pace(settings.get("time_budget_seconds"))
        self.study: SearchStudy | None = None
        self.ray: engine.Connection | None = None
        self.starting: Future[engine.Connection] | None = None
        self.refused: Exception | None = None
        self.failures = 0
        self.log = _open_log(folder)
        self.base: Base | None = None
        try:
            self._prepare(address)
        except BaseException:
            self.close()
            raise

    def _prepare(self, address: str | None) -> None:
        task, folder, settings = self.task, self.folder, self.settings
        if address is not None:
            self._tell("joining the cluster")
            self.ray = engine.join_ray(address, folder / LOG)
        self._tell("loading the model")
        self.original = self._original().to(fastest_device())
        check_task(task, self.original)
        self._tell("reading the model")
        self.workshop = Workshop(task, self.original, self.rules, folder, self.seed, fastest_device())
        self.base = Base(
            (folder / BASE).stat().st_size,
            measure(task, self.original, "val"),
            measure(task, self.original, "test"),
            chance_accuracy(self.workshop.calibration, self.original),
        )
        self._check_accuracy_target()
        self.space = self.workshop.space
        for site, reason in self.workshop.anatomy.left_alone.items():
            self.log.info("left alone: %s: %s", site, reason)
        cpus, gpus = engine.cluster_size() if self.ray else (min(os.cpu_count() or 1, 8), torch.cuda.device_count())
        self.workers: int = settings["workers"] or gpus or cpus
        self.gpus = min(1.0, gpus / self.workers)
        self._tell(PROFILING)
        self.profile = self._profile()
        limit = self.settings["max_size_bytes"]
        if limit is not None and limit < 0.5 * self.profile.smallest_bytes():
            smallest = self.profile.smallest_bytes()
            raise TargetError(
                f"no file of {format_size(limit)} can be reached in space {self.rules.name!r}: the smallest is about "
                f"{format_size(smallest)}; raise max size or widen the space"
            )

    def _check_accuracy_target(self) -> None:
        wanted = self.settings["min_accuracy"]
        assert self.base is not None
        if wanted is not None and not wanted <= self.base.val_accuracy + 0.1 * self.base.skill:
            raise TargetError(
                f"minimum accuracy {wanted:g} cannot be reached: the original model has "
                f"{format_accuracy(self.base.val_accuracy)} on the validation split"
            )

    # ------------------------------------------------------------ set-up

    def _original(self) -> nn.Module:
        """The trained model; trained now when the task can and the run folder has no weights yet."""
        path = self.folder / BASE
        if path.is_file():
            model = self.task.build()
            assign(model, load_file(path))
            return model
        model = trained(self.task, self.seed, self._tell)
        write_file(
            path,
            save({key: value.cpu().contiguous().clone() for key, value in tensors(model).items()}),
        )
        return model

    def _profile(self) -> Profile:
        path = self.folder / PROFILE
        if not path.is_file():
            self._start_ray()
            write_file(path, json.dumps(measured_profile(self.workshop, self._measure_profile)).encode())
        return Profile(self.space, self.workshop.anatomy, json.loads(path.read_text()))

    def _measure_profile(self) -> dict[str, Any]:
        def progress(share: float) -> None:
            self._tell(f"{PROFILING}: {100 * share:.0f}%")

        seconds = self.workshop.probe_seconds()
        threads = 1 if self.gpus else torch.get_num_threads()  # a worker has one, this process all of this machine
        seconds *= min(1.0, threads / self.workers)
        probes = int(min(MANY_PROBES, _PROFILING * self.pace.left() / seconds))
        count = sum(map(len, needed_choices(self.space, self.workshop.anatomy, probes).values()))
        self.log.info("the profile tries %d choices", count)
        if self.workers == 1 or count * seconds < WORTH_WORKERS:
            return self.workshop.base_profile(progress, probes)
        self._wait_for_ray()
        try:
            parts = engine.measure_profile(self._payload(), self.workers, self.gpus, progress, probes)
        except Exception:
            self.log.warning("the profile is measured here, not by workers:\n%s", traceback.format_exc())
            return self.workshop.base_profile(progress, probes)
        return self.workshop.joined_profile(parts)

    def _start_ray(self) -> None:
        """As far as it is not there or on its way."""
        if self.ray is None and self.starting is None:
            self.starting = engine.starting_ray(self.workers)

    def _wait_for_ray(self) -> None:
        self._start_ray()
        if self.ray is None and self.starting is not None:
            self._tell("starting Ray")
            self.ray = self.starting.result()

    def close(self) -> None:
        """End what this run started."""
        if self.study is not None:
            self.study.close()
        if self.starting is not None and self.starting.exception() is None:
            self.ray = self.starting.result()
        if self.ray is not None:
            self.ray.close()

    # ------------------------------------------------------------ the search

    def run(self) -> ParetoFront:
        assert self.base is not None
        self.sampler = make_sampler(
            self.settings["sampler"],
            self.profile,
            self.budget,
            self.base,
            self.seed,
            self.settings["max_size_bytes"],
            self.settings["min_accuracy"],
        )
        self.study = SearchStudy(self.folder, self.space, self.budget, self.sampler)
        self.results = Results(self.workshop, self.rules.name, self.base, self.study)
        try:
            self.study.recover()
            if self.study.remaining() > 0:
                self._run_engine()
            self._tell("measuring the front on the test split")
            front = self.results.final_front()
            self._tell("done")
            self.log.info("done: %d points on the front", len(front))
            return front
        finally:
            self.close()

    def _payload(self) -> bytes:
        return payload(self.task, self.named, self.original, self.space, self.folder, self.seed)

    def _run_engine(self) -> None:
        assert self.study is not None
        sent = self._payload()
        self._wait_for_ray()
        fruitless = 0
        while (remaining := self.study.remaining()) > 0 and fruitless < MAX_FRUITLESS and not self._over():
            before = len(self.study.complete())
            # an interrupted Tune may write on for a moment: no reason to end otherwise than by the interrupt
            with tempfile.TemporaryDirectory(
                prefix=".tune-", dir=self._scratch(), ignore_cleanup_errors=True
            ) as scratch:
                engine.run_trials(sent, self, _MANY, min(self.workers, remaining), self.gpus, Path(scratch))
            if self.refused is not None:
                raise self.refused
            for trial in self.study.trials(TrialState.RUNNING):
                self.lost(trial.number)
            fruitless = 0 if len(self.study.complete()) > before else fruitless + 1

    def _scratch(self) -> Path:
        """Where Ray Tune may write: what all nodes of a cluster share is the run folder."""
        assert self.ray is not None
        return self.ray.folder or self.folder

    def _over(self) -> bool:
        """Whether time is up, though the first trial runs in any case, or whatever is tried fails."""
        assert self.study is not None
        took = self.study.seconds()
        if not took and self.failures >= HOPELESS:
            return True
        return bool(self.study.trials()) and self.pace.late(took)

    def _keep_pace(self) -> None:
        """With a budget of time alone, that of trials follows."""
        assert self.study is not None
        if self.settings.get("paced"):
            workers = 1 + len(self.study.trials(TrialState.RUNNING))
            self.budget = self.study.budget = self.study.finished() + self.pace.fits(workers, self.study.seconds())
            if isinstance(self.sampler, FrontierSampler):
                self.sampler.budget = self.budget

    # ------------------------------------------------------------ Supply

    def next(self) -> TrialSpec | None:
        assert self.study is not None
        try:
            spec = None if self._over() else self.study.ask()
        except Exception as error:  # Ray would call it a lost worker
            self.refused, spec = error, None
        if spec is not None:
            self.log.info(
                "trial %d: starts from %s",
                spec.number,
                "the original" if spec.parent is None else spec.parent,
            )
            self._tell("searching")
        return spec

    def rung(self, number: int, rung: Rung) -> bool:
        assert self.study is not None
        assert self.base is not None
        self.study.rung(number, rung)
        return is_dominated(self.study, number, rung, self.base.skill)

    def finished(self, number: int, result: TrialResult) -> None:
        assert self.study is not None
        self.study.tell(number, result)
        self._keep_pace()
        self.log.info(
            "trial %d: %d bytes, validation accuracy %s",
            number,
            result.size_bytes,
            format_accuracy(result.val_accuracy),
        )
        self.results.keep()
        self._tell("searching")

    def stopped(self, number: int) -> None:
        assert self.study is not None
        self.study.prune(number)
        self.log.info("trial %d: stopped at its rung, clearly dominated", number)
        self._tell("searching")

    def failed(self, number: int, reason: str) -> None:
        assert self.study is not None
        self.study.fail(number, reason)
        self.failures += 1
        write_file(self.workshop.trial_folder(number) / "error.txt", reason.encode())
        self.log.warning("trial %d failed: %s", number, reason.strip().splitlines()[-1])
        self._tell("searching")

    def lost(self, number: int) -> None:
        assert self.study is not None
        again = "; its recipe is run again" if self.study.lose(number) else ""
        self.failed(number, f"the worker died: killed, out of memory, or its node was lost{again}")

    # ------------------------------------------------------------ to people

    def _tell(self, phase: str) -> None:
        if self.listener is None:
            return
        done, failed = 0.0, 0
        points: tuple[tuple[int, float], ...] = ()
        if self.study is not None:
            done = self.study.spent()
            complete = self.study.complete()
            failed = sum(1 for t in self.study.trials() if t.user_attrs.get("error"))
            points = tuple((int(t.values[0]), float(t.values[1])) for t in complete)
        self.listener(
            Progress(
                phase,
                self.folder,
                done,
                failed,
                self.budget,
                time.monotonic() - self.began,
                self.base,
                points,
            )
        )


def _open_log(folder: Path) -> logging.Logger:
    log = logging.getLogger("autocompress")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(folder / LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
