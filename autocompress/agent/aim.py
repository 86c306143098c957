"""Which files a search is for: within a size, above an accuracy, both, or the whole front."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from autocompress.agent.acquisition import Region
from autocompress.agent.candidate import Point
from autocompress.agent.profile import Profile
from autocompress.front import skill

_USEFUL, _UNIT = 1 / 15, 0.05
"""Share of the original's skill that a useful file may lose; and share of that by which the ceiling lies above the best
accuracy."""
ENOUGH = 0.8
"""Share of a size to meet below which smaller files earn no more, and where the walk ends."""
_FAR, _NEARLY = 2.0, 0.1
"""With a least accuracy: files larger than this times the smallest that keeps it earn nothing; parents may miss it by
this share of what a useful file may lose."""
_SIZE_MET, _ACCURACY_MET = 0.5, 0.5
"""Bonus for meeting the size, in log2 bytes, and the accuracy, as a share of what a useful file may lose."""


class Aim:
    """base_accuracy, chance_accuracy: of the original, and of its mean output, on the validation split. max_size_bytes,
    min_accuracy: what was asked for, if anything. original_bytes, smallest_bytes: predicted of the lightest recipe and
    of the smallest file."""

    def __init__(
        self,
        profile: Profile,
        base_accuracy: float,
        chance_accuracy: float,
        max_size_bytes: float | None,
        min_accuracy: float | None,
    ) -> None:
        self.base_accuracy, self.skill = base_accuracy, skill(base_accuracy, chance_accuracy)
        self.max_size_bytes, self.min_accuracy = max_size_bytes, min_accuracy
        self.original_bytes = profile.predict(profile.default())
        self.smallest_bytes = profile.smallest_bytes()
        self._may_lose = _USEFUL * self.skill

    def least_accuracy(self, done: Sequence[Point]) -> float:
        """Of a file from which a useful one may still come."""
        if self.min_accuracy is None:
            return self._least_useful(done)
        return self.min_accuracy - _NEARLY * self._may_lose

    @cached_property
    def least_bytes(self) -> float:
        """Smaller files earn no more."""
        if self.max_size_bytes is None or self.min_accuracy is not None:
            return self.smallest_bytes / 4
        return ENOUGH * self.max_size_bytes

    def over(self, walked: Sequence[Point]) -> bool:
        """Whether a walk has come to where lower accuracies, or fewer bytes, are of no more use."""
        smallest = sorted(walked, key=lambda p: p.size)[:2]
        return len(walked) >= 4 and all(
            p.accuracy < self.least_accuracy(walked) or p.size <= self.least_bytes for p in smallest
        )

    def region(self, done: Sequence[Point]) -> Region:
        """Where hypervolume counts; what was asked for counts most where it is met."""
        least, accuracy_margin = self._least_useful(done), 0.0
        largest, size_margin = self.original_bytes, 0.0
        if self.max_size_bytes is not None:
            largest, size_margin = self.max_size_bytes, _SIZE_MET
        if self.min_accuracy is not None:
            least, accuracy_margin = self.min_accuracy, _ACCURACY_MET * self._may_lose
            largest = min([largest, *(p.size * _FAR for p in done if p.accuracy >= least)])
        best = max([self.base_accuracy, *(p.accuracy for p in done)])
        ceiling = best + _UNIT * self._may_lose
        return Region(self.least_bytes, largest, least, ceiling, size_margin, accuracy_margin)

    def _least_useful(self, done: Sequence[Point]) -> float:
        """As much below the original, or below the best file of the size that was asked for, where that is worse."""
        fitting = [p.accuracy for p in done if self.max_size_bytes is None or p.size <= self.max_size_bytes]
        best = max(fitting, default=self.base_accuracy - self.skill)
        return min(best, self.base_accuracy) - self._may_lose
