"""Activations that stand in for others: fitted to them, trained further, and read back from the file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import pack, unpack
from autocompress.errors import SpaceError
from autocompress.recipe import Choice, Recipe
from autocompress.task import Task, measure
from autocompress.techniques.base import structures
from autocompress.techniques.piecewise_linear import PiecewiseLinear
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune
from tests.conftest import ZOO, small_digits, workshop_of, zoo_task

ACTIVATION = structures()["activation"]
OFFERED = ["relu6", "hardswish", "piecewise-8", "step", "step-sigmoid", "fatrelu-0.8", "topk-0.2"]


def candidate_of(task: Task, choices: dict[str, Choice]) -> Candidate:
    workshop = workshop_of(task)
    return Candidate(workshop.original, workshop.anatomy, Recipe.of(choices), workshop.calibration)


def replaced(choice: str, old: nn.Module, inputs: Tensor) -> nn.Module:
    """The module that stands in for `old`, fitted on `inputs`."""
    model = nn.Sequential(old)
    ACTIVATION.apply(model, {"0": choice}, lambda model: model(inputs))
    return model[0]


@pytest.mark.parametrize("choice", OFFERED)
@pytest.mark.parametrize("name", ["mlp", "residual", "conv1d", "transformer", "unet", "two_inputs"])
def test_the_file_gives_back_the_trained_function(choice: str, name: str) -> None:
    task = zoo_task(name)
    sites = workshop_of(task).anatomy.activations
    candidate = candidate_of(task, {f"{site}:activation": choice for site in sites})
    for _ in fine_tune(task, candidate, task.build(), 1):
        pass
    decoded = unpack(pack(candidate.weights(), candidate.recipe), ZOO[name][0])
    inputs = next(task.batches("val"))[0]
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        torch.testing.assert_close(decoded(*args), candidate.model(*args), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("old", [nn.Tanh(), nn.GELU(), nn.ReLU()])
def test_piecewise_linear_is_fitted_to_the_original(old: nn.Module) -> None:
    """Independent reference: numpy's interpolation."""
    import numpy as np

    inputs = torch.linspace(-3, 4, 1001)
    module = replaced("piecewise-16", old, inputs)
    assert isinstance(module, PiecewiseLinear)
    knots = np.linspace(-3, 4, 17)
    expected = np.interp(inputs.numpy(), knots, old(torch.from_numpy(knots).float()).numpy())
    got = module(inputs)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    assert (got - old(inputs)).abs().max() < 0.06
    torch.autograd.backward(got.square().sum())
    assert module.values.grad is not None
    assert bool((module.values.grad != 0).sum() >= 8)


def test_piecewise_linear_does_not_saturate() -> None:
    module = replaced("piecewise-8", nn.ReLU(), torch.linspace(-1, 1, 100))
    torch.testing.assert_close(module(torch.tensor([-5.0, 5.0])), torch.tensor([0.0, 5.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["step", "step-sigmoid"])
def test_binary_activations_take_two_values_and_pass_gradients(choice: str) -> None:
    inputs = torch.randn(500, requires_grad=True)
    module = replaced(choice, nn.ReLU(), inputs.detach())
    output = module(inputs)
    assert len(output.unique()) == 2
    torch.testing.assert_close(output.max(), inputs[inputs > 0].mean())
    torch.autograd.backward(output.sum())
    assert inputs.grad is not None
    assert (inputs.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("choice", ["step", "step-sigmoid"])
def test_binary_activations_learn_ten_classes(choice: str) -> None:
    torch.manual_seed(0)
    task = small_digits()
    candidate = candidate_of(task, {"2:activation": choice, "4:activation": choice})
    for _ in fine_tune(task, candidate, task.build(), 16):
        pass
    assert measure(task, candidate.model, "val") > 0.8


def test_a_threshold_leaves_the_asked_share_of_zeros() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(10_000)
    output = replaced("fatrelu-0.8", nn.ReLU(), inputs)(inputs)
    assert float((output == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert torch.equal(output[output != 0], inputs[output != 0])


def test_top_k_keeps_the_largest_of_each_sample() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 5, 4, 2)
    output = replaced("topk-0.2", nn.ReLU(), inputs)(inputs)
    for row, kept in zip(inputs.flatten(1), output.flatten(1), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(8).indices.tolist())


@pytest.mark.parametrize("raw", ["piecewise-1", "piecewise-999", "fatrelu-2", "topk-0", "topk-x", "swish", 3])
def test_what_makes_no_sense_is_refused(raw: object) -> None:
    with pytest.raises(SpaceError, match="does not exist; choose from keep, relu"):
        ACTIVATION.parse(raw)
