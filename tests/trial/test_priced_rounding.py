"""Rounding by rate and distortion: what it costs, and what it is worth."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.artifact import load, read_artifact
from autocompress.files import ARTIFACT
from autocompress.recipe import Recipe
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.techniques.base import Steps
from autocompress.trial import priced_rounding
from autocompress.trial.compression import Candidate
from autocompress.trial.priced_rounding import rounded
from autocompress.trial.rate import bits_of_magnitudes
from autocompress.trial.reconstruction import reconstruct
from autocompress.trial.workshop import Workshop
from tests.conftest import small_digits, zoo_task

STEP, LOW, HIGH = 0.25, -4, 3


def problem(groups: int, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """(weights, a Hessian for each group)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 4 * inputs, inputs, generator=generator, dtype=torch.float64)
    mixed = x @ torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    weight = 0.4 * torch.randn(groups, outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, mixed.mT @ mixed / 100


def solved(weight: Tensor, hessian: Tensor, price: float, free: Tensor | None = None, step: float = STEP) -> Tensor:
    start = (weight / step).round().clamp(LOW, HIGH)
    every = torch.ones_like(weight, dtype=torch.bool) if free is None else free
    prices = torch.full_like(weight[:, :, :1], price)
    steps = Steps(torch.tensor(step, dtype=torch.float64), LOW, HIGH)
    return rounded(start, every, weight, hessian, prices, steps)


def error(codes: Tensor, weight: Tensor, hessian: Tensor) -> float:
    off = (codes * STEP - weight).numpy()
    return float(np.einsum("gmi,gij,gmj->", off, hessian.numpy(), off))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_no_other_code_of_one_weight_is_better(groups: int, outputs: int, inputs: int, seed: int) -> None:
    """Once it has settled, by trying all of them."""
    weight, hessian = problem(groups, outputs, inputs, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(priced_rounding, "_ROUNDS", 60)
        codes = solved(weight, hessian, price=0.0)
    best = error(codes, weight, hessian)
    assert best <= error((weight / STEP).round().clamp(LOW, HIGH), weight, hessian) + 1e-9
    for place in itertools.product(*map(range, weight.shape)):
        for code in range(LOW, HIGH + 1):
            other = codes.clone()
            other[place] = code
            assert error(other, weight, hessian) >= best - 1e-9


def test_a_higher_price_buys_fewer_bits_for_more_error() -> None:
    weight, hessian = problem(1, 40, 60, 0)
    spent, off = [], []
    for price in (0.0, 1.0, 4.0, 16.0):
        codes = solved(weight, hessian, price)
        assert torch.equal(codes, codes.round())
        assert codes.min() >= LOW
        assert codes.max() <= HIGH
        table = bits_of_magnitudes(codes, -LOW)
        spent.append(float(table[codes.abs().long()].sum()))
        off.append(error(codes, weight, hessian))
    assert spent == sorted(spent, reverse=True)
    assert off == sorted(off)
    assert spent[-1] < 0.5 * spent[0]


def test_at_equal_bits_it_is_nearer_than_weights_that_are_decided_alone() -> None:
    """Coarser steps, and the nearest code."""
    weight, hessian = problem(1, 60, 80, 1)
    priced = solved(weight, hessian, price=4.0)
    bits = float(bits_of_magnitudes(priced, -LOW)[priced.abs().long()].sum())
    for coarser in np.geomspace(1, 16, 60):
        codes = (weight / (STEP * coarser)).round().clamp(LOW, HIGH)
        if float(bits_of_magnitudes(codes, -LOW)[codes.abs().long()].sum()) <= bits:
            break
    assert error(priced, weight, hessian) < 0.5 * error(codes * coarser, weight, hessian)


def test_what_may_not_change_does_not() -> None:
    weight, hessian = problem(2, 7, 11, 2)
    free = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    codes = solved(weight, hessian, 0.01, free)
    start = (weight / STEP).round().clamp(LOW, HIGH)
    assert torch.equal(codes[~free], start[~free])
    assert not torch.equal(codes, start)


def test_parts_of_a_layer_come_to_what_all_of_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(2, 9, 17, 3)
    whole = solved(weight, hessian, 0.02)
    monkeypatch.setattr(priced_rounding, "_OUTPUTS", 4)
    monkeypatch.setattr(priced_rounding, "_COLUMNS", 5)
    assert torch.equal(solved(weight, hessian, 0.02), whole)


def test_numbers_that_are_not_finite_change_nothing() -> None:
    weight, hessian = problem(1, 3, 5, 4)
    start = (weight / STEP).round().clamp(LOW, HIGH)
    steps = Steps(torch.tensor(STEP, dtype=torch.float64), LOW, HIGH)
    free, price = torch.ones_like(start, dtype=torch.bool), torch.ones_like(start[:, :, :1])
    assert torch.equal(rounded(start, free, weight * torch.nan, hessian, price, steps), start)


# ------------------------------------------------------------ trials


def finished(workshop: Workshop, number: int, weights: str, price: float) -> tuple[int, float]:
    layers = {f"{layer.name}:weights": weights for layer in workshop.anatomy.layers}
    sparse = {f"{layer.name}:sparsity": 0.6 for layer in workshop.anatomy.layers}
    result = workshop.finish(number, Recipe.of(layers | sparse | {"model:rate_penalty": price}))
    return result.size_bytes, result.val_accuracy


def test_a_price_makes_files_smaller_without_training(tmp_path: Path) -> None:
    """And what pruning asked for stays zero."""
    workshop = Workshop.on(small_digits(epochs=0), SearchSpace.named("default"), tmp_path)
    whole, free = finished(workshop, 0, "int5", 0.0)
    priced, paid = finished(workshop, 1, "int5", 1.0)
    assert priced < 0.85 * whole
    assert paid > free - 0.02
    stored = read_artifact(tmp_path / "trials" / "1" / ARTIFACT)
    weights = dict(load(tmp_path / "trials" / "1" / ARTIFACT, workshop.task.build).named_parameters())
    for layer in workshop.anatomy.layers:
        assert stored.tensors[layer.parameter].choice == "int5"
        assert (weights[layer.parameter] == 0).float().mean() >= 0.59


@pytest.mark.parametrize("weights", ["float16", "codebook-16", "ternary"])
def test_formats_without_steps_have_no_price(weights: str, tmp_path: Path) -> None:
    workshop = Workshop.on(small_digits(epochs=0), SearchSpace.named("default"), tmp_path)
    assert finished(workshop, 0, weights, 0.0) == finished(workshop, 1, weights, 1.0)


@pytest.mark.parametrize("name", ["depthwise", "unet", "lstm"])
def test_steps_of_each_channel_and_weights_of_any_layout(name: str, tmp_path: Path) -> None:
    """A file holds the codes that were chosen, whatever dimension of the weight has the steps."""
    task = zoo_task(name, epochs=0)
    workshop = Workshop(task, task.build(), SearchSpace.named("default"), tmp_path, 0)
    sizes = [finished(workshop, number, "int4-channel", price)[0] for number, price in enumerate((0.0, 0.5))]
    assert sizes[1] < sizes[0]
    layers = {f"{layer.name}:weights": "int4-channel" for layer in workshop.anatomy.layers}
    candidate = Candidate(
        workshop.original, workshop.anatomy, Recipe.of({**layers, "model:rate_penalty": 0.5}), workshop.calibration
    )
    reconstruct(candidate, workshop.samples)
    for shadow in candidate.layers.values():
        with torch.no_grad():
            torch.testing.assert_close(shadow.coefficients(), shadow.masked(), rtol=1e-5, atol=1e-6)


class Opaque(nn.Module):
    """Cannot be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).detach()
        return out


def test_a_model_without_gradients_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(96, 24), torch.zeros(96, dtype=torch.long))]
    workshop = Workshop.on(Task(Opaque(), batches, batches, batches, epochs=0), SearchSpace.named("default"), tmp_path)
    assert finished(workshop, 0, "int5", 0.0) == finished(workshop, 1, "int5", 1.0)
