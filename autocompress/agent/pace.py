"""How many trials fit into the time that a search was given."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence


class Pace:
    """seconds: of the whole search, from now; None for no limit."""

    def __init__(self, seconds: float | None) -> None:
        now = time.monotonic()
        self._deadline = math.inf if seconds is None else now + seconds
        self._since, self._before = now, 0

    def start(self, finished: int) -> None:
        """Trials begin now; so many were finished before."""
        self._since, self._before = time.monotonic(), finished

    def late(self, took: Sequence[float]) -> bool:
        """Whether a trial that began now would end after the deadline. took: seconds of those so far."""
        return time.monotonic() + (statistics.median_high(took) if took else 0.0) > self._deadline

    def fits(self, finished: int) -> int:
        """Trials in all: what was finished, and as many again as the time left is longer."""
        now = time.monotonic()
        left = max(self._deadline - now, 0.0) / max(now - self._since, 1e-3)
        return finished + round(max(finished - self._before, 1) * left)
