"""The forecast learns what the trials show, also where it is not what was believed."""

from __future__ import annotations

import math
import random

import numpy as np

from autocompress.agent.forecast import BytesForecast, Forecast, Step


def pairs(count: int, noise: float = 0.05) -> list[tuple[Step, float]]:
    """A world in which half the bytes triple what lacks, and training on takes a third of it away."""
    rng = random.Random(0)
    out = []
    for number in range(count):
        move = rng.choice(["step", "step", "train"])
        halvings = rng.uniform(0.1, 1.5) if move == "step" else 0.0
        step = Step(move, halvings, rng.uniform(2, 8), rng.uniform(1, 8), trained=rng.randrange(3), parent=number)
        change = math.log(3) * halvings if move == "step" else math.log(2 / 3)
        out.append((step, step.lacking * math.exp(change + rng.gauss(0, noise))))
    return out


def test_it_learns_what_steps_and_training_do() -> None:
    mean, deviation = Forecast(pairs(100))([Step("step", 1.0, 5.0, 3.0, 0, -1), Step("train", 0.0, 5.0, 3.0, 0, -1)])
    np.testing.assert_allclose(np.exp(mean), [9, 2], rtol=0.2)
    assert (deviation < 0.5).all()


def test_more_pairs_make_it_more_sure() -> None:
    step = [Step("step", 1.0, 5.0, 3.0, 0, -1)]
    few, many = (float(Forecast(pairs(count))(step)[1][0]) for count in (3, 300))
    assert many < few


def test_without_pairs_smaller_is_worse_and_training_helps() -> None:
    steps = [Step("step", halvings, 5.0, 2.0, 0, -1) for halvings in (0.2, 0.6, 1.2)]
    mean, deviation = Forecast([])([*steps, Step("train", 0.0, 5.0, 2.0, 0, -1)])
    assert mean[0] < mean[1] < mean[2]
    assert mean[3] < math.log(2)
    assert (deviation > 0).all()


def test_a_parent_whose_children_disappoint_is_expected_to_disappoint_again() -> None:
    lucky, other = (Step("step", 0.5, 5.0, 3.0, 0, parent) for parent in (1000, 1001))
    disappointed = [(lucky, lucky.lacking * math.exp(0.5 * math.log(3) + 0.3))] * 4
    mean, deviation = Forecast(pairs(60, noise=0.2) + disappointed)([lucky, other])
    assert mean[0] > mean[1] + 0.1
    assert deviation[0] < deviation[1]


def test_each_move_scatters_in_its_own_way_and_a_failure_promises_nothing() -> None:
    rng = random.Random(1)
    moves = [Step(move, 0.3 * (move == "step"), 5.0, 3.0, 0, n) for n in range(40) for move in ("step", "train")]
    known = [(s, s.lacking * math.exp(rng.gauss(0, 0.4 if s.move == "step" else 0.04))) for s in moves]
    mean, deviation = Forecast(known)(moves[:2])
    assert deviation[0] > 3 * deviation[1]
    failed = [(s, 60.0 if i % 8 == 1 else lacked) for i, (s, lacked) in enumerate(known)]
    worse, unsure = Forecast(failed)(moves[:2])
    assert worse[1] > mean[1]
    assert worse[1] - unsure[1] > mean[1] - deviation[1]


def test_it_learns_how_a_training_choice_changes_the_bytes() -> None:
    """In this world a price of 4 against 0 makes files of half the bytes, and any training of nine tenths."""
    rng = random.Random(0)
    choices = {"model:rate_penalty": (0.0, 4.0), "model:precision": ("float32", "bfloat16")}
    changes = []
    for _ in range(40):
        before, after = ({key: rng.choice(c) for key, c in choices.items()} for _ in range(2))
        halvings = (after["model:rate_penalty"] - before["model:rate_penalty"]) / 4
        changes.append((before, after, math.log(0.9) - math.log(2) * halvings + rng.gauss(0, 0.05)))
    forecast = BytesForecast(choices, changes)
    low, high = ({"model:rate_penalty": price, "model:precision": "float32"} for price in (0.0, 4.0))
    np.testing.assert_allclose(forecast(low, high), 0.45, rtol=0.1)
    np.testing.assert_allclose(forecast(high, high), 0.9, rtol=0.1)
    assert BytesForecast(choices, [])(low, high) == 1
