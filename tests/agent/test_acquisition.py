"""Expected improvement against its definition: the mean over drawn accuracies of what hypervolume gains."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.agent.acquisition import Region, drawn_fronts, expected_improvement
from autocompress.front import hypervolume

REGION = Region(1e-3, 1e6, 0.85, 1.0)
points = st.tuples(st.floats(10, 9e5), st.floats(0.5, 0.999))


def of_one(front: list[tuple[float, float]], region: Region, size: float, mean: float, deviation: float) -> float:
    arrays = (np.array([value]) for value in (size, mean, deviation))
    return float(expected_improvement(front, region, *arrays)[0])


@settings(max_examples=40, deadline=None)
@given(st.lists(points, max_size=8), st.floats(100, 9e5), st.floats(-6, -2), st.floats(0.05, 0.8))
def test_it_is_the_mean_gain_of_drawn_outcomes(
    front: list[tuple[float, float]], size: float, mean: float, deviation: float
) -> None:
    drawn = np.random.default_rng(0).normal(mean, deviation, 4000)
    before = hypervolume(front, REGION.largest_bytes, REGION.least_accuracy)
    gains = [
        hypervolume([*front, (size, REGION.ceiling - lacks)], REGION.largest_bytes, REGION.least_accuracy) - before
        for lacks in np.exp(drawn)
    ]
    predicted = of_one(front, REGION, size, mean, deviation)
    assert predicted == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / 4000**0.5 + 1e-4)


def test_a_file_that_is_smaller_than_asked_for_earns_no_more() -> None:
    region = Region(500.0, 1000.0, 0.85, 1.0)
    gains = [of_one([], region, size, -3.0, 0.1) for size in (2000.0, 800.0, 500.0, 100.0)]
    assert gains[0] == 0 < gains[1] < gains[2] == gains[3]


def test_meeting_a_size_is_worth_most() -> None:
    region = Region(800.0, 1000.0, 0.85, 1.0, size_margin=0.5)
    gains = [of_one([(1010.0, 0.99)], region, size, -3.0, 0.1) for size in (1001.0, 1000.0, 800.0)]
    assert gains[0] == 0
    assert gains[2] - gains[1] < gains[1]


def test_meeting_an_accuracy_is_worth_most() -> None:
    region = Region(100.0, 1000.0, 0.95, 1.0, accuracy_margin=0.05)
    front = [(500.0, 0.949), (600.0, 0.96)]
    gains = [of_one(front, region, 500.0, np.log(lacks), 1e-3) for lacks in (0.051, 0.049, 0.041, 0.039)]
    assert gains[0] < 1e-9, "a parent that misses by little does not stand in the way, and is no gain itself"
    per_bit = np.log2(600 / 500)
    assert gains[1] == pytest.approx((0.05 + 0.001) * per_bit, rel=0.01)
    assert gains[2] == pytest.approx((0.05 + 0.009) * per_bit, rel=0.01)
    assert gains[3] > gains[2] + 0.001


def test_what_is_likely_dominated_earns_next_to_nothing() -> None:
    assert of_one([(1000.0, 0.99)], REGION, 2000.0, np.log(0.05), 0.1) < 1e-6
    assert of_one([(1000.0, 0.99)], REGION, 500.0, np.log(0.05), 0.1) > 0.05


def test_what_is_on_its_way_is_drawn_as_it_is_expected() -> None:
    front, rng = [(1000.0, 0.95)], random.Random(0)
    assert drawn_fronts(front, [], 1.0, rng) == [front]
    fronts = [f for _ in range(100) for f in drawn_fronts(front, [(500.0, 0.9, 0.3), (200.0, 0.8, 0.0)], 1.0, rng)]
    assert all(f[0] == front[0] and f[2] == pytest.approx((200.0, 0.8)) for f in fronts)
    lacks = np.log([1 - f[1][1] for f in fronts])
    assert lacks.mean() == pytest.approx(math.log(0.1), abs=0.05)
    assert lacks.std() == pytest.approx(0.3, abs=0.05)


def test_a_trial_on_its_way_leaves_its_neighbours_as_much_as_it_is_doubtful() -> None:
    gains = []
    for deviation in (0.1, 1.0):
        fronts = drawn_fronts([], [(500.0, 0.95, deviation)], 1.0, random.Random(0))
        gains.append(np.mean([of_one(front, REGION, 500.0, math.log(0.05), 0.1) for front in fronts]))
    assert 0 < 2 * gains[0] < gains[1]
