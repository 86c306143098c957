"""The study: Optuna's journal in the run folder is the single source of truth of a search."""

from __future__ import annotations

import fcntl
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from autocompress.agent.candidate import ATTRIBUTES
from autocompress.agent.journal import Journal
from autocompress.agent.sampler import FrontierSampler, distributions
from autocompress.errors import RunError, in_words
from autocompress.space import BoundSpace
from autocompress.trial.workshop import Rung, TrialResult, TrialSpec

STUDY_NAME = "autocompress"
JOURNAL, LOCK = "study.journal", ".lock"


class SearchStudy:
    """Asks for candidates, is told results, counts the budget, recovers what a crash left behind.

    Two objectives: bytes of the file (minimised) and validation accuracy (maximised). One process may
    hold a study at a time; a second one gets a RunError.
    """

    def __init__(self, folder: Path, space: BoundSpace, budget: int, sampler: BaseSampler | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.budget = space, budget
        self._lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"run {str(folder)!r} is in use by another process: wait for it or stop it") from None
        self._journal = Journal(folder / JOURNAL)
        try:
            self.study = optuna.create_study(
                storage=JournalStorage(self._journal),
                study_name=STUDY_NAME,
                directions=["minimize", "maximize"],
                sampler=sampler,
                load_if_exists=True,
            )
        except ValueError as error:
            self._lock.close()
            raise RunError(
                f"{str(folder / JOURNAL)!r} cannot be read: {in_words(error)}: put it back, or start a new run"
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.study.set_metric_names(["size_bytes", "val_accuracy"])
        self._distributions = distributions(space)
        problem = self._mismatch()
        if problem:
            self._lock.close()
            raise RunError(f"run {str(folder)!r} was started {problem}, or start a new run")

    def _mismatch(self) -> str:
        """What is not as it was for the trials that there are."""
        now = self._distributions
        known = {key: distribution for trial in self.trials() for key, distribution in trial.distributions.items()}
        for key in known.keys() & now.keys():
            if known[key] != now[key]:
                return (
                    f"where {key} had the choices {_listed(known[key])}, here it has {_listed(now[key])}: resume it on "
                    "such a machine and with its own space"
                )
        other = sorted(known.keys() ^ now.keys()) if known else []
        if other:
            had = "with" if other[0] in known else "without"
            return f"{had} the dimension {other[0]}: resume it with its own model and version of autocompress"
        return ""

    def close(self) -> None:
        self._lock.close()

    # ------------------------------------------------------------ counting

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def complete(self) -> list[FrozenTrial]:
        return self.trials(TrialState.COMPLETE)

    def seconds(self) -> list[float]:
        """What each complete trial took."""
        return [float(t.user_attrs["seconds"]) for t in self.complete()]

    def finished(self) -> int:
        """Trials that are over; orphans, which are asked again, are not counted."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return sum(1 for t in self.trials(*states) if not t.user_attrs.get("orphan"))

    def spent(self) -> float:
        """What was spent of the budget, in whole trials: one that was stopped counts as far as it came."""
        stopped = sum(1 - float(t.user_attrs.get("share", 1)) for t in self.trials(TrialState.PRUNED))
        return self.finished() - stopped

    def remaining(self) -> int:
        """Trials still to be asked for."""
        return math.floor(self.budget - self.spent() - len(self.trials(TrialState.RUNNING)) + 1e-9)

    # ------------------------------------------------------------ ask and tell

    def ask(self) -> TrialSpec | None:
        """The next candidate, or None when the budget is spent."""
        if self.remaining() <= 0:
            return None
        sampler = self.study.sampler
        with self._journal.at_once():
            if isinstance(sampler, FrontierSampler) and not self.trials(TrialState.WAITING):
                number = len(self.trials())
                self._record(*sampler.next(self.study, number))
            else:
                number = self.study.ask(self._distributions).number
        trial = self.get(number)
        return TrialSpec(number, self.space.recipe(trial.params).to_json(), trial.user_attrs.get("parent"))

    def _record(self, chosen: dict[str, Any], attributes: dict[str, Any]) -> None:
        """A whole recipe is one line of the journal; Optuna writes one for each parameter that it suggests."""
        self.study.add_trial(
            # not `optuna.create_trial`, which first compares every distribution with those of older versions
            FrozenTrial(
                number=-1,  # this and the next are the study's to give
                trial_id=-1,
                state=TrialState.RUNNING,
                value=None,
                datetime_start=datetime.now(),
                datetime_complete=None,
                params=chosen,
                distributions=self._distributions,
                user_attrs=attributes,
                system_attrs={},
                intermediate_values={},
            )
        )

    def tell(self, number: int, result: TrialResult) -> None:
        """Record a finished trial; telling twice is the same as once."""
        if self._open(number):
            values = {key: value for key, value in asdict(result).items() if key not in ("size_bytes", "val_accuracy")}
            self._note(number, values)
            self.study.tell(number, [result.size_bytes, result.val_accuracy])

    def rung(self, number: int, rung: Rung) -> None:
        if rung.val_accuracy is not None and self._open(number):
            self._note(number, {f"rung_{rung.epoch}": rung.val_accuracy, "share": rung.epoch / rung.epochs})

    def prune(self, number: int) -> None:
        if self._open(number):
            self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        if self._open(number):
            self._note(number, {"error": reason[-4000:]})
            self.study.tell(number, state=TrialState.FAIL)

    def lose(self, number: int) -> bool:
        """A trial whose worker died, which need not be its own fault, is asked again; False when it was before."""
        trial = self.get(number)
        if trial.state != TrialState.RUNNING or trial.user_attrs.get("again"):
            return False
        self._ask_again(trial, {"again": True})
        return True

    def recover(self) -> int:
        """Ask again for the trials that a dead process left running."""
        orphans = self.trials(TrialState.RUNNING)
        for trial in orphans:
            self._ask_again(trial, {})
        return len(orphans)

    def _ask_again(self, trial: FrozenTrial, noted: Mapping[str, Any]) -> None:
        keep = {k: v for k, v in trial.user_attrs.items() if k in (*ATTRIBUTES, "again")}
        self._note(trial.number, {"orphan": True})
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.study.enqueue_trial(dict(trial.params), user_attrs={**keep, **noted})

    def get(self, number: int) -> FrozenTrial:
        return self.trials()[number]

    def _open(self, number: int) -> bool:
        return self.get(number).state == TrialState.RUNNING

    def _note(self, number: int, attributes: Mapping[str, Any]) -> None:
        storage, trial_id = self.study._storage, self.get(number)._trial_id
        with self._journal.at_once():
            for key, value in attributes.items():
                storage.set_trial_user_attr(trial_id, key, value)


def _listed(distribution: BaseDistribution) -> str:
    return ", ".join(map(str, getattr(distribution, "choices", ())))


logging.getLogger("optuna").setLevel(logging.ERROR)
