"""How many trials fit into the time that a search was given."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence


class Pace:
    """seconds: of the whole search, from now; None for no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds

    def late(self, took: Sequence[float]) -> bool:
        """Whether more than one in ten trials that began now would end after the deadline. took: seconds of those so
        far."""
        return time.monotonic() + (sorted(took)[-1 - len(took) // 10] if took else 0.0) > self._deadline

    def left(self) -> float:
        """Seconds until the deadline, infinite where there is none."""
        return max(self._deadline - time.monotonic(), 0.0)

    def fits(self, workers: int, took: Sequence[float]) -> int:
        """Trials that so many workers can still end. took: seconds of at least one."""
        return math.floor(workers * self.left() / max(statistics.median_high(took), 1e-3))
