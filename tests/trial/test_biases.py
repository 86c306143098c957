"""Biases and norms: which of their values a price of bits leaves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import pack, unpack
from autocompress.artifact.container import decode_artifact
from autocompress.recipe import Recipe
from autocompress.report.inside import VECTORS, parts
from autocompress.task import Task, measure
from autocompress.trial.biases import worthless
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune
from tests.conftest import small_digits, workshop_of, zoo_task


@pytest.mark.parametrize("seed", range(20))
def test_no_other_set_of_values_is_better(seed: int) -> None:
    """Against all sets, their cost as numpy has it."""
    rng = np.random.default_rng(seed)
    harm, bits, price = rng.exponential(1e-3, 9), rng.uniform(1, 8), rng.exponential(2e-4)

    def cost(zero: np.ndarray) -> float:
        share = zero.mean()
        told = sum(-p * math.log2(p) for p in (share, 1 - share) if p)
        return float(price * len(zero) * (told + (1 - share) * bits) + harm[zero].sum())

    best = min(cost(np.array(zero)) for zero in itertools.product((False, True), repeat=len(harm)))
    assert cost(worthless(torch.from_numpy(harm), bits, price).numpy()) == pytest.approx(best)


def test_all_go_when_bits_are_dear_and_none_when_they_are_free() -> None:
    harm = torch.rand(3, 4) + 0.1
    assert worthless(harm, 6.0, 1e9).all()
    assert not worthless(harm, 6.0, 0.0).any()


class Attentive(nn.Module):
    """Reads the rows of an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.into(x.flatten(1).unflatten(1, (8, 8))))
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


def _trained(task: Task, price: float) -> Candidate:
    workshop = workshop_of(task)
    recipe = {f"{layer.name}:weights": "int4" for layer in workshop.anatomy.layers} | {"model:rate_penalty": price}
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(recipe), workshop.calibration)
    torch.manual_seed(0)
    for _ in fine_tune(task, candidate, workshop.original, 12):
        pass
    return candidate


def test_the_bias_of_keys_goes_and_what_matters_stays() -> None:
    """The softmax of attention is the same whatever is added to all keys."""
    digits = small_digits()
    torch.manual_seed(0)
    task = Task(Attentive(), digits.train, digits.val, digits.test, epochs=12, learning_rate=0.01)
    without, priced = (_trained(task, price) for price in (0.0, 0.02))
    assert all(value.all() for value in without.model.parameters() if value.ndim == 1)
    decoded = unpack(pack(priced.weights(), priced.recipe), Attentive)
    assert not decoded.get_parameter("attention.k_proj.bias").any()
    assert decoded.get_parameter("into.bias").any()
    assert decoded.get_parameter("norm.weight").all(), "scales are no biases"
    assert measure(task, decoded, "val") > measure(task, without.model, "val") - 0.05


def test_biases_of_recurrent_layers_go_too() -> None:
    candidate = _trained(zoo_task("lstm"), 50.0)
    biases = [value for name, value in candidate.model.named_parameters() if "bias_" in name]
    assert len(biases) == 2
    assert not any(bias.any() for bias in biases)


def test_batch_norms_are_left_alone() -> None:
    """Their shift in the file is less than their bias by what their statistics say."""
    digits = small_digits()
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)]
    task = Task(nn.Sequential(*layers), digits.train, digits.val, digits.test, epochs=12, learning_rate=0.01)
    candidate = _trained(task, 20.0)
    norm = candidate.model.get_submodule("2")
    assert (candidate.model.get_parameter("1.bias") == 0).all(), "a norm takes it out again"
    assert (norm.get_parameter("weight") != 0).all()
    assert (norm.get_parameter("bias") != 0).all()


def test_a_file_tells_how_many_are_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    nn.init.zeros_(model.get_parameter("0.bias"))
    workshop = workshop_of(Task(model, *[[(torch.rand(4, 8), torch.zeros(4, dtype=torch.long))]] * 3))
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe(), workshop.calibration)
    artifact = decode_artifact(pack(candidate.weights(), candidate.recipe))
    (vectors,) = [part for part in parts(artifact) if part.name == VECTORS]
    assert vectors.zeros == pytest.approx(16 / 24), "the bias, and that of the norm"
