"""The walk: from light to heavy compression in geometric steps of bytes, each from the trials before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property

from autocompress.agent.aim import ENOUGH, Aim
from autocompress.agent.planner import plan
from autocompress.agent.profile import Profile
from autocompress.techniques.base import trainings

_SHARE, _WORKERS = 0.5, 2
"""Share of the budget that it may take, and workers from which it takes less, by the root of their number: their steps
cannot wait for each other, so they are long anyway, and improving what has finished is worth more."""
_FEWEST, _MOST = 6, 60
"""Steps of a small and of a large budget."""
LONGEST = 0.35
"""The smallest share of its parent's bytes that one step leaves."""
_RUINED = 1.0
"""Distance from the original's outputs, in nats for scores of classes, at which the walk ends: what was planned to be
that far without training has lost, trained, more than is of use."""
_HALVINGS = 10
"""Of the range of bytes in which it is looked for."""
_WIDTH = 4.0
"""The smallest factor between the bytes of its first and of its last step."""
_BELOW = 0.97
"""The largest share of the smallest bytes so far that the next step aims at."""
_RACED = 0.65
"""How far down the walk, in logarithms of bytes, the recipe is that learning rates are raced by."""


class Walk:
    """budget: trials in all, which may change while the search runs."""

    def __init__(self, profile: Profile, aim: Aim, budget: int) -> None:
        self.profile, self.aim, self.budget = profile, aim, budget

    def ends(self, workers: int = 1) -> tuple[float, float, int]:
        """(bytes of the first step, of the last, number of steps)."""
        original, smallest = self.aim.original_bytes, self.aim.smallest_bytes
        first = min(0.22 * original, self._mild_bytes)
        last = max(smallest * 1.1, original / 1200, min(self._ruined_bytes, first / _WIDTH))
        if self.aim.max_size_bytes is not None:
            last = max(smallest, min(first, self.aim.max_size_bytes) * ENOUGH)
            first = max(first, last * 1.5)
        first = max(first, last * 1.2)
        share = _SHARE / math.sqrt(max(workers / _WORKERS, 1.0))
        count = min(max(1, round(share * self.budget), min(self.budget, _FEWEST)), _MOST)
        return first, max(last, first * LONGEST ** (count - 1)), count

    def target(
        self,
        number: int,
        workers: int,
        walked: Sequence[float],
        going: Sequence[float],
        ancestor: Callable[[float], float | None],
    ) -> tuple[float, bool]:
        """(bytes of step `number`, whether they are tried already, so that another recipe is wanted).

        walked, going: bytes of finished trials, and of steps on their way. ancestor: bytes of a step -> those of the
        finished trial that it would start from.
        """
        first, last, count = self.ends(workers)
        taken = [*going, *walked]
        if not taken:
            return first, False
        lowest = min(taken)
        target = lowest * min(last / lowest, _BELOW) ** (1 / (count - number))
        start = ancestor(target)
        largest = first if start is None else start
        shortest = largest * LONGEST ** max(1.0, len(going) / count if start is None else 0.0)
        if target >= shortest:
            return target, False
        # many workers, few ancestors: the same bytes in different ways, where they are fewest
        marks = sorted([shortest, largest, *(size for size in taken if shortest < size < largest)])
        below, above = max(itertools.pairwise(marks), key=lambda pair: pair[1] / pair[0])
        return math.sqrt(below * above), True

    def raced_bytes(self) -> float:
        """Of the recipe that learning rates are raced by."""
        first, last, _ = self.ends()
        return first * math.exp(_RACED * math.log(last / first))

    def depth(self, size_bytes: float) -> float:
        """How far down the walk a file is, in logarithms of bytes: 0 at the first step, 1 at the raced recipe."""
        first, raced = self.ends()[0], self.raced_bytes()
        return max(math.log(first / size_bytes) / math.log(first / raced), 0.0) if raced < first else 0.0

    @cached_property
    def _ruined_bytes(self) -> float:
        """Of the smallest plan that leaves, before any training, something of the original."""
        profile, effects = self.profile, self.profile.effect_table
        allowed = {d.key: d.choices for d in profile.space if d.name not in trainings()}
        smallest, largest = self.aim.smallest_bytes, self.aim.original_bytes
        for _ in range(_HALVINGS):
            middle = math.sqrt(smallest * largest)
            place = profile.place(plan(profile, effects, middle, profile.default(), allowed))
            if effects[range(len(place)), place].sum() > _RUINED:
                smallest = middle
            else:
                largest = middle
        return largest

    @cached_property
    def _mild_bytes(self) -> float:
        """Of a recipe whose every dimension of bytes is one third of the way."""
        chosen = self.profile.default()
        for key, d in self.profile.dimensions.items():
            if d.name in ("weights", "sparsity"):
                chosen[key] = d.choices[len(d.choices) // 3]
        return self.profile.predict(chosen)
