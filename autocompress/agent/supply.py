"""What an engine needs of the controller: trials to run, and someone to tell how they went."""

from __future__ import annotations

from typing import Protocol

from autocompress.trial.workshop import Rung, TrialResult, TrialSpec


class Supply(Protocol):
    """Called from one thread."""

    def next(self) -> TrialSpec | None:
        """The next trial, or None when the budget is spent."""

    def rung(self, number: int, rung: Rung) -> bool:
        """Take note of a rung; True when the trial should stop here."""

    def finished(self, number: int, result: TrialResult) -> None: ...

    def stopped(self, number: int) -> None: ...

    def failed(self, number: int, reason: str) -> None: ...

    def lost(self, number: int) -> None:
        """The trial's worker died, by its own fault or not."""
