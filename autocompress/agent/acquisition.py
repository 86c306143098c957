"""Expected hypervolume improvement: what a candidate of nearly known bytes and uncertain accuracy adds to the front.

Emmerich, Giannakoglou and Naujoks, 2006, in (log2 bytes, accuracy). As in the forecast, what lacks to the ceiling is
log-normal; so the expectation over each step of the front has the form of a put option (Black and Scholes, 1973).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from autocompress.agent.profile import Floats
from autocompress.front import non_dominated

_DRAWS = 12
"""Of what may come of the trials that are on their way."""


@dataclass(frozen=True)
class Region:
    """Where files are of use. smallest_bytes: smaller ones gain nothing more. ceiling: an accuracy above all.

    size_margin, accuracy_margin: log2 bytes and accuracy that any file gains by being no larger than `largest_bytes`
    and no worse than `least_accuracy`, beside those by which it is smaller and better.
    """

    smallest_bytes: float
    largest_bytes: float
    least_accuracy: float
    ceiling: float
    size_margin: float = 0.0
    accuracy_margin: float = 0.0


def expected_improvement(
    front: Sequence[tuple[float, float]], region: Region, size_bytes: Floats, mean: Floats, deviation: Floats
) -> Floats:
    """float64 [n]: area that each of n candidates is expected to add to `front`, (bytes, accuracy) pairs.

    mean, deviation: float64 [n], of the logarithm of what its accuracy lacks to the ceiling.
    """
    low, high = math.log2(region.smallest_bytes), math.log2(region.largest_bytes) + region.size_margin
    steps = [front[i] for i in non_dominated(front)]
    sizes, accuracies = np.array(steps, np.float64).reshape(-1, 2).T

    def place(size: Floats) -> Floats:
        return np.where(size <= region.largest_bytes, np.log2(size), high)

    edges = np.clip([low, *place(sizes), high], low, high)
    floor = region.least_accuracy - region.accuracy_margin
    levels = np.array([floor, *np.where(accuracies >= region.least_accuracy, accuracies, floor)])
    begin = np.maximum(place(size_bytes)[:, None], edges[:-1])
    width = np.maximum(np.maximum(edges[1:], begin) - begin, 0.0)
    needed = np.maximum(levels, region.least_accuracy)
    room = np.maximum(region.ceiling - needed, 1e-12)
    bound = (np.log(room) - mean[:, None]) / deviation[:, None]
    lacking = np.exp(mean + deviation**2 / 2)[:, None]
    height = (region.ceiling - levels) * ndtr(bound) - lacking * ndtr(bound - deviation[:, None])
    gain: Floats = (width * np.maximum(height, 0.0)).sum(1)
    return gain


def drawn_fronts(
    front: Sequence[tuple[float, float]],
    pending: Sequence[tuple[float, float, float]],
    ceiling: float,
    rng: random.Random,
) -> list[list[tuple[float, float]]]:
    """`front` with what may come of trials that are on their way, drawn some times (fantasies, Snoek et al., 2012);
    `front` alone when none is.

    pending: (bytes, expected accuracy, deviation of the logarithm of what that lacks to the ceiling) of each.
    """

    def drawn(size: float, expected: float, deviation: float) -> tuple[float, float]:
        return size, ceiling - (ceiling - expected) * math.exp(deviation * rng.gauss(0, 1))

    return [[*front, *(drawn(*trial) for trial in pending)] for _ in range(_DRAWS if pending else 1)]
