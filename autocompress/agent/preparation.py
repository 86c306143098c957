"""What is there before the first trial: the original and its accuracy, the profile, the Ray that trials will run on."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from autocompress.agent import engine
from autocompress.agent.pace import Pace
from autocompress.agent.payload import payload
from autocompress.agent.profile import Profile
from autocompress.agent.profile_cache import known_profile, measured_profile
from autocompress.agent.run_folder import BASE, LOG, PROFILE
from autocompress.allocator import return_freed_memory
from autocompress.chance import chance_accuracy
from autocompress.errors import RunError, TargetError, in_words
from autocompress.files import write_file
from autocompress.front import Base, format_accuracy
from autocompress.model.reparametrization import plain
from autocompress.model.surgery import assign, tensors
from autocompress.seeds import seed_everything
from autocompress.sizes import format_size
from autocompress.space import SearchSpace
from autocompress.task import Task, check_task, fastest_device, measure
from autocompress.trial.probing import MANY_PROBES, choice_count, needed_choices
from autocompress.trial.workshop import Workshop

PROFILING = "profiling every choice"
WORTH_WORKERS = 15
"""Seconds that a profile would take here at least, for workers to measure it: the trials then wait for others."""
_PROFILE_SHARE = 0.25
"""Of the time that is left, which the profile may take."""
_FEW_PROBES, _OF_TRIALS = 400, 0.1
"""Choices that a profile may always try, and the share of what the trials take that it may take beyond."""


@dataclass(frozen=True)
class Progress:
    """What a listener is called with, after every step of a search."""

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


class Preparation:
    """All that is there before the first trial. Raises AutocompressError when what was asked for cannot be done.

    settings: as `write_config` takes them. named: workers find the task by its name. address: of a Ray cluster, None
    for a private Ray. Whoever has it closes its `cluster`.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        rules: SearchSpace,
        settings: dict[str, Any],
        listener: Listener,
        named: bool,
        address: str | None = None,
    ) -> None:
        self.folder, self.task, self.rules, self.settings, self.named = folder, task, rules, settings, named
        self.seed = int(settings["seed"])
        self.log = _open_log(folder)
        self.pace = Pace(settings.get("time_budget_seconds"))
        self.cluster = engine.Cluster()
        self._listener, self._began = listener, time.monotonic()
        self._told = Progress("", folder, budget=int(settings["budget"]))
        try:
            self._prepare(address)
        except BaseException:
            self.cluster.close()
            raise

    def tell(self, phase: str, **news: Any) -> None:
        """The listener, of this phase. news: other fields of `Progress`, which stay as they were."""
        self._told = replace(self._told, phase=phase, seconds=time.monotonic() - self._began, **news)
        self._listener(self._told)

    def payload(self) -> bytes:
        """What a worker is sent (see `payload`)."""
        return payload(self.task, self.named, self.original, self.space, self.folder, self.seed)

    def wait_for_ray(self) -> None:
        """Until the cluster is there. Raises RunError when Ray does not start."""
        if self.cluster.connection is None:
            self.tell("starting Ray")
        self.cluster.wait(self.workers)

    def _prepare(self, address: str | None) -> None:
        if address is not None or engine.is_connected():
            self.tell("joining the cluster")
            self.cluster.join(address or "auto", self.folder / LOG)
        self.tell("loading the model")
        self.original = self._original().to(fastest_device())
        check_task(self.task, self.original)
        self.tell("reading the model")
        self.workshop = Workshop(self.task, self.original, self.rules, self.folder, self.seed, fastest_device())
        self.base = Base(
            (self.folder / BASE).stat().st_size,
            measure(self.task, self.original, "val"),
            measure(self.task, self.original, "test"),
            chance_accuracy(self.workshop.calibration, self.original),
        )
        self._check_accuracy()
        self.space = self.workshop.space
        for site, reason in self.workshop.anatomy.left_alone.items():
            self.log.info("left alone: %s: %s", site, reason)
        cpus, gpus = self.cluster.size()
        self.workers: int = self.settings["workers"] or gpus or cpus
        self.gpus = min(1.0, gpus / self.workers)
        self.tell(PROFILING, base=self.base)
        self.profile = self._profile()
        return_freed_memory()
        self._check_size()

    def _original(self) -> nn.Module:
        """The trained model; trained now when the task can and the run folder has no weights yet."""
        path = self.folder / BASE
        if path.is_file():
            model = self.task.build()
            try:
                weights = load_file(path)
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"{str(path)!r} cannot be read: {in_words(error)}: put the original's weights back, or start a new "
                    "run"
                ) from error
            assign(model, weights)
            return model
        model = trained(self.task, self.seed, self.tell)
        write_file(path, save({key: value.cpu().contiguous().clone() for key, value in tensors(model).items()}))
        return model

    def _check_accuracy(self) -> None:
        wanted = self.settings["min_accuracy"]
        if wanted is not None and not wanted <= self.base.val_accuracy + 0.1 * self.base.skill:
            raise TargetError(
                f"minimum accuracy {wanted:g} cannot be reached: the original model has "
                f"{format_accuracy(self.base.val_accuracy)} on the validation split"
            )

    def _check_size(self) -> None:
        limit, smallest = self.settings["max_size_bytes"], self.profile.smallest_bytes()
        if limit is not None and limit < 0.5 * smallest:
            raise TargetError(
                f"no file of {format_size(limit)} can be reached in space {self.rules.name!r}: the smallest is about "
                f"{format_size(smallest)}; raise max size or widen the space"
            )

    def _profile(self) -> Profile:
        path = self.folder / PROFILE
        measured = known_profile(path)
        if measured is None:
            self.cluster.start(self.workers)
            with _threads(max(1, torch.get_num_threads() - self.workers)) as threads:  # whose start takes the others
                seconds = self.workshop.probe_seconds()
                worth = max(_FEW_PROBES, _OF_TRIALS * int(self.settings["budget"]) * self.workshop.trial_probes())
                allowed = _PROFILE_SHARE * self.pace.left()
                if allowed >= WORTH_WORKERS:  # by workers, of one thread each
                    allowed *= max(1.0, self.workers / (1 if self.gpus else threads))
                probes = int(min(MANY_PROBES, worth, allowed / seconds))
                measured = measured_profile(self.workshop, lambda: self._measure_profile(probes, seconds), probes)
            write_file(path, json.dumps(measured).encode())
        return Profile(self.space, self.workshop.anatomy, measured)

    def _measure_profile(self, probes: int, seconds: float) -> dict[str, Any]:
        """seconds: that one probe takes here."""

        def progress(share: float) -> None:
            self.tell(f"{PROFILING}: {100 * share:.0f}%")

        count = choice_count(needed_choices(self.space, self.workshop.anatomy, probes))
        self.log.info("the profile tries %d choices", count)
        if self.workers == 1 or count * seconds < WORTH_WORKERS:
            return self.workshop.base_profile(progress, probes)
        self.wait_for_ray()
        try:
            parts = engine.measure_profile(self.payload(), self.workers, self.gpus, progress, probes)
        except Exception:
            self.log.warning("the profile is measured here, not by workers:\n%s", traceback.format_exc())
            return self.workshop.base_profile(progress, probes)
        return self.workshop.joined_profile(parts)


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """So many are torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


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
