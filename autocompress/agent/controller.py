"""The search: feeds the engine with candidates and takes in what became of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.trial import TrialState

from autocompress.agent import engine
from autocompress.agent.preparation import Preparation
from autocompress.agent.results import Results
from autocompress.agent.sampler import FrontierSampler
from autocompress.agent.samplers import make_sampler
from autocompress.agent.scheduler import is_dominated
from autocompress.agent.study import SearchStudy
from autocompress.errors import AutocompressError, RunError
from autocompress.files import ERROR, write_file
from autocompress.front import ParetoFront, format_accuracy
from autocompress.trial.workshop import Rung, TrialResult, TrialSpec

_MANY = 1_000_000
MAX_FRUITLESS = 3
"""Tune runs in a row that may end without a finished trial before the search gives up."""
HOPELESS = 8
"""Trials that may fail, before any has finished, before the search gives up."""


class Controller:
    """One run. Implements the engine's Supply; knows studies and files, but no layer of torch."""

    def __init__(self, prepared: Preparation) -> None:
        self.prepared, self.pace, self.log = prepared, prepared.pace, prepared.log
        self.workshop, self.base, settings = prepared.workshop, prepared.base, prepared.settings
        budget = int(settings["budget"])
        self.sampler = make_sampler(
            settings["sampler"],
            prepared.profile,
            budget,
            self.base,
            prepared.seed,
            settings["max_size_bytes"],
            settings["min_accuracy"],
            prepared.task.epochs > 0,
        )
        self.study = SearchStudy(prepared.folder, prepared.space, budget, self.sampler)
        self.results = Results(self.workshop, prepared.rules.name, self.base, self.study)
        self.refused: Exception | None = None
        self.failures = 0

    def run(self) -> ParetoFront:
        """The front of the finished search. Raises AutocompressError when no trial finished."""
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
            self.study.close()

    def _run_engine(self) -> None:
        sent, cluster, workers = self.prepared.payload(), self.prepared.cluster, self.prepared.workers
        self.prepared.wait_for_ray()
        fruitless = 0
        while (remaining := self.study.remaining()) > 0 and fruitless < MAX_FRUITLESS and not self._over():
            before = len(self.study.complete())
            # an interrupted Tune may write on for a moment: no reason to end otherwise than by the interrupt
            with tempfile.TemporaryDirectory(
                prefix=".tune-", dir=cluster.scratch(self.prepared.folder), ignore_cleanup_errors=True
            ) as scratch:
                engine.run_trials(sent, self, _MANY, min(workers, remaining), self.prepared.gpus, Path(scratch))
            if isinstance(self.refused, AutocompressError):
                raise RunError(
                    f"{self.refused} (finished trials are kept: once that is mended, --resume goes on)"
                ) from self.refused
            if self.refused is not None:
                raise self.refused
            for trial in self.study.trials(TrialState.RUNNING):
                self.lost(trial.number)
            fruitless = 0 if len(self.study.complete()) > before else fruitless + 1

    def _over(self) -> bool:
        """Whether time is up, though the first trial runs in any case, or whatever is tried fails."""
        took = self.study.seconds()
        if not took and self.failures >= HOPELESS:
            return True
        return bool(self.study.trials()) and self.pace.late(took)

    def _keep_pace(self) -> None:
        """With a budget of time alone, that of trials follows."""
        if self.prepared.settings.get("paced"):
            workers = 1 + len(self.study.trials(TrialState.RUNNING))
            self.study.budget = self.study.finished() + self.pace.fits(workers, self.study.seconds())
            if isinstance(self.sampler, FrontierSampler):
                self.sampler.walk.budget = self.study.budget

    # ------------------------------------------------------------ Supply

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong inside ends the search: Ray would log it and go on, or call it a lost worker."""
        try:
            yield
        except Exception as error:
            self.refused = self.refused or error

    def next(self) -> TrialSpec | None:
        spec = None
        with self._refusing():
            if self.refused is None and not self._over() and (spec := self.study.ask()) is not None:
                start = "the original" if spec.parent is None else spec.parent
                self.log.info("trial %d: starts from %s", spec.number, start)
                self._tell("searching")
        return spec if self.refused is None else None

    def rung(self, number: int, rung: Rung) -> bool:
        with self._refusing():
            self.study.rung(number, rung)
            return is_dominated(self.study, number, rung, self.base.skill)
        return True

    def finished(self, number: int, result: TrialResult) -> None:
        with self._refusing():
            self.study.tell(number, result)
            self._keep_pace()
            accuracy = format_accuracy(result.val_accuracy)
            self.log.info("trial %d: %d bytes, validation accuracy %s", number, result.size_bytes, accuracy)
            self.results.keep()
            self._tell("searching")

    def stopped(self, number: int) -> None:
        with self._refusing():
            self.study.prune(number)
            self.log.info("trial %d: stopped at its rung, clearly dominated", number)
            self._tell("searching")

    def failed(self, number: int, reason: str) -> None:
        with self._refusing():
            self.study.fail(number, reason)
            self.failures += 1
            write_file(self.workshop.trial_folder(number) / ERROR, reason.encode())
            self.log.warning("trial %d failed: %s", number, reason.strip().splitlines()[-1])
            self._tell("searching")

    def lost(self, number: int) -> None:
        with self._refusing():
            again = "; its recipe is run again" if self.study.lose(number) else ""
            self.failed(number, f"the worker died: killed, out of memory, or its node was lost{again}")

    def _tell(self, phase: str) -> None:
        self.prepared.tell(
            phase,
            done=self.study.spent(),
            failed=sum(1 for t in self.study.trials() if t.user_attrs.get("error")),
            budget=self.study.budget,
            points=tuple((int(t.values[0]), float(t.values[1])) for t in self.study.complete()),
        )
