"""Which learning rate suits heavy compression: one recipe, trained from the original at several of them.

A single step down from a parent hardly shows it, a heavy recipe without ancestors does: at half the task's own rate, at
that, at twice and at four times of it, such a recipe had an accuracy of 0.959, 0.964, 0.969 and 0.974 on one task, of
0.91, 0.92, 0.87 and 0.80 on another. The guess is one choice above the task's own rate; a budget that is too small for
a race keeps to it, but for one choice more where files are smallest, and the race climbs from there, one choice at a
time, while it pays. Of many workers, who have no ancestors to start from yet, up to half try what may be asked next
while those before are on their way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from autocompress.recipe import Choice
from autocompress.space import BoundDimension
from autocompress.techniques.base import trainings

RACE = "race"
"""Move of its trials."""
_WINS = 0.9
"""A rate further from the guess has to lose at most this share of the accuracy that its neighbour loses."""


def has_learning_rates(dimension: BoundDimension) -> bool:
    """Whether its choices are learning rates."""
    technique = trainings().get(dimension.name)
    return technique is not None and any(technique.learning_rate_factor(c) != 1 for c in dimension.choices)


class Race:
    """dimension: whose choices are learning rates. base_accuracy: of the original. trials: asked for so far."""

    def __init__(self, dimension: BoundDimension, base_accuracy: float) -> None:
        self.key, self._base = dimension.key, base_accuracy
        factor = trainings()[dimension.name].learning_rate_factor
        self._choices = sorted(dimension.choices, key=factor)
        self._own = min(range(len(self._choices)), key=lambda i: abs(math.log(factor(self._choices[i]))))
        self._guess = min(self._own + 1, len(self._choices) - 1)
        self.trials = 0
        self._lost: dict[Choice, float | None] = {}
        """Rate -> accuracy lost, None as long as it is tried."""

    def note(self, trials: Sequence[FrozenTrial]) -> None:
        """Learn from all trials of a study."""
        raced = [t for t in trials if t.user_attrs.get("move") == RACE and not t.user_attrs.get("orphan")]
        self.trials, self._lost, failed = len(raced), {}, set[Choice]()
        for trial in raced:
            rate = trial.params[self.key]
            if trial.state == TrialState.COMPLETE:
                self._lost[rate] = max(self._base - trial.values[1], 1e-9)
            elif not trial.state.is_finished():
                self._lost[rate] = None
            elif trial.state == TrialState.PRUNED or rate in failed:
                self._lost[rate] = math.inf  # others are clearly better
            else:
                failed.add(rate)  # of whatever: it is asked for once more

    def next(self, running: int) -> Choice | None:
        """What is to be tried now, beside so many trials; None when the race is over, or waits for one of them."""
        _, choice, waits = self._climb()
        racing = sum(lost is None for lost in self._lost.values())
        if waits and 2 * (racing + 1) <= running + 1:
            untried = [i for i, c in enumerate(self._choices) if c not in self._lost]
            return self._choices[min(untried, key=lambda i: abs(i - self._guess))] if untried else None
        return choice

    def learning_rate(self, depth: float) -> Choice:
        """The winner at depth 1 of the walk and below, the task's own rate at 0, and between them in steps of the
        choices; everywhere the winner, where it is less than the task's own. A guess goes on in its steps below."""
        won, raced = self._climb()[0], bool(self._lost)
        at = won if won < self._own else self._own + round((min(depth, 1.0) if raced else depth) * (won - self._own))
        return self._choices[min(at, len(self._choices) - 1)]

    def _climb(self) -> tuple[int, Choice | None, bool]:
        """(place of the winner so far, what is to be tried now, whether that depends on trials that are running)."""
        at = self._guess
        if self._choices[at] not in self._lost:
            return at, self._choices[at], False
        for way in (1, -1):
            while 0 <= at + way < len(self._choices):
                here, there = self._choices[at], self._choices[at + way]
                if there not in self._lost:
                    return at, there, False
                before, after = self._lost[here], self._lost[there]
                if before is None or after is None:
                    return at, None, True
                if math.isinf(after) or after > _WINS * before:
                    break
                at += way
            if at != self._guess:
                break
        return at, None, False
