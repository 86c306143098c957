"""Choices that trials may fail of: each is suspected until a trial that has it was trained.

A failed trial does not tell which of its choices it failed of. So proposals keep away from a part of the suspects,
drawn anew each time, and what trains nevertheless is cleared (group testing, Dorfman, 1943, at random).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState

from autocompress.recipe import Choice

Suspect = tuple[str, Choice]
"""(key of a dimension, choice)."""


class Suspects:
    """cleared: choices of the original, which works, one for each key of the space; other keys are ignored. failed:
    recipes, in the order of their trials."""

    def __init__(self, cleared: Mapping[str, Choice]) -> None:
        self.failed: list[dict[str, Choice]] = []
        self._keys = frozenset(cleared)
        self._cleared, self._failures, self._noted = set(cleared.items()), Counter[Suspect](), set[int]()

    def note(self, trials: Sequence[FrozenTrial]) -> None:
        """Learn from all trials of a study; those that were lost with their process tell nothing."""
        for trial in trials:
            if trial.number in self._noted or not trial.state.is_finished() or trial.user_attrs.get("orphan"):
                continue
            self._noted.add(trial.number)
            chosen = {key: choice for key, choice in trial.params.items() if key in self._keys}
            if trial.state == TrialState.FAIL:
                self.failed.append(chosen)
                self._failures.update(chosen.items())
            else:
                self._cleared.update(chosen.items())

    def drawn(self, rng: random.Random) -> set[Suspect]:
        """Those to keep away from this time: half of what one trial failed with, three quarters of what two did."""
        suspects = [(suspect, n) for suspect, n in self._failures.items() if suspect not in self._cleared]
        return {suspect for suspect, n in suspects if rng.random() >= 0.5**n}
