"""Rate-distortion optimised rounding: cheaper neighbours where the loss does not feel it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import pack
from autocompress.recipe import Recipe
from autocompress.task import Task, measure
from autocompress.techniques.base import IntegerWeights, trainings
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune
from tests.conftest import small_digits, workshop_of

ROUNDING = trainings()["rounding"]


def weights(sensitivity: Tensor | float) -> IntegerWeights:
    torch.manual_seed(0)
    scaled = torch.randn(200) * 2
    bits = torch.tensor([0.5, 2.0, 3.0, 5.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    return IntegerWeights(scaled, torch.as_tensor(sensitivity).expand(200), bits)


def test_each_weight_takes_the_cheaper_neighbour() -> None:
    """Independent reference: every weight tries both."""
    given = weights(torch.rand(200) * 3)
    got = ROUNDING.settle(0.7, given)
    for x, s, q in zip(given.scaled.tolist(), given.sensitivity.tolist(), got.tolist(), strict=True):
        costs = {c: s * (x - c) ** 2 + 0.7 * float(given.bits[abs(c)]) for c in (math.floor(x), math.floor(x) + 1)}
        assert q in costs
        assert costs[int(q)] <= min(costs.values()) + 1e-5


def test_a_loss_that_feels_everything_rounds_to_the_nearest() -> None:
    given = weights(1e6)
    assert torch.equal(ROUNDING.settle(0.7, given), given.scaled.round())


def test_a_loss_that_feels_nothing_takes_fewer_bits() -> None:
    given = weights(0.0)
    assert bool((ROUNDING.settle(0.7, given).abs() <= given.scaled.abs()).all())


def test_a_price_on_rounding_makes_the_file_smaller_and_keeps_the_pruned() -> None:
    sizes, accuracies = [], []
    for price in (0, 0.3):
        torch.manual_seed(0)
        task = small_digits()
        workshop = workshop_of(task)
        choices = {"1:weights": "int5", "3:weights": "int5", "1:sparsity": 0.5, "model:rounding": price}
        candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(choices), workshop.calibration)
        for _ in fine_tune(task, candidate, task.build(), 6):
            pass
        mask = candidate.layers["1"].mask
        assert mask is not None
        assert not candidate.model[1].weight[mask == 0].any()
        sizes.append(len(pack(candidate.weights(), candidate.recipe)))
        accuracies.append(measure(task, candidate.model, "val"))
    assert sizes[1] < 0.98 * sizes[0]
    assert accuracies[1] > accuracies[0] - 0.05


class Kept(nn.Module):
    """Computes something once while it is evaluated, with the gradients of then."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias, self.known = nn.Linear(8, 3), nn.Parameter(torch.zeros(3)), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.known.clear()
        else:
            self.known = self.known or [self.bias.exp()]
        out: Tensor = self.body(x) + (self.known[0] if self.known else self.bias.exp())
        return out


def test_a_model_without_gradients_is_rounded_to_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    data = [(torch.randn(16, 8), torch.zeros(16, dtype=torch.long))] * 3
    task = Task(Kept(), data, data, data, epochs=1)
    workshop = workshop_of(task)
    recipe = Recipe.of({"body:weights": "int4", "model:rounding": 0.3})
    candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
    assert [*fine_tune(task, candidate, workshop.original, 1)] == [1]
    assert "rounded to the nearest, for the model has no gradients" in caplog.text
