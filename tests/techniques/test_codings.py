"""What every coding promises, whatever it does inside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.artifact.container import Plan, decode_artifact, encode_artifact
from autocompress.recipe import Choice, Recipe
from autocompress.techniques.base import coding_choices, coding_of

CHOICES = sorted(map(str, coding_choices()))
SHAPES = [(8, 3, 3, 3), (16, 4, 5), (12, 20), (30,), (), (2, 0)]


def through_file(weight: torch.Tensor, choice: Choice, parameters: torch.Tensor) -> torch.Tensor:
    data = encode_artifact({"w": Plan(weight, choice, parameters)}, Recipe())
    return decode_artifact(data).tensors["w"].value


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_file_gives_back_what_training_saw(choice: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    coding, weight = coding_of(choice), torch.randn(shape) * 0.1
    parameters = coding.initial(weight, choice)
    assert torch.equal(through_file(weight, choice, parameters), coding.simulate(weight, choice, parameters))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CHOICES), st.integers(0, 999), st.floats(1e-6, 1e4), st.floats(-1, 1))
def test_also_with_any_scale_and_any_step(choice: str, seed: int, scale: float, nudge: float) -> None:
    torch.manual_seed(seed)
    coding, weight = coding_of(choice), torch.randn(5, 7) * scale
    weight[torch.rand(5, 7) < 0.4] = 0
    parameters = coding.initial(weight, choice) + nudge
    simulated = coding.simulate(weight, choice, parameters)
    assert torch.equal(through_file(weight, choice, parameters), simulated)
    assert bool((simulated[weight == 0] == 0).all()), "pruned weights stay zero"


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_reach_the_weight(choice: str) -> None:
    torch.manual_seed(0)
    coding, weight = coding_of(choice), torch.randn(20, 20, requires_grad=True)
    parameters = coding.initial(weight, choice).requires_grad_()
    torch.autograd.backward((coding.simulate(weight, choice, parameters) - 1).square().sum())
    assert weight.grad is not None
    assert (weight.grad != 0).float().mean() > 0.5
    if parameters.numel():
        assert parameters.grad is not None
        assert bool(parameters.grad.isfinite().all())
        assert bool((parameters.grad != 0).all())


def test_float32_is_the_identity() -> None:
    weight = torch.randn(6, 6)
    assert torch.equal(coding_of("float32").simulate(weight, "float32", torch.empty(0)), weight)


@pytest.mark.parametrize("choice", ["float16", "bfloat16"])
def test_halves_round_as_torch_does(choice: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000)
    expected = weight.to(getattr(torch, choice)).float()
    got = coding_of(choice).simulate(weight, choice, torch.empty(0))
    torch.testing.assert_close(got, expected, rtol=2**-8 if choice == "bfloat16" else 0, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_take_two_to_the_bits_values(bits: int) -> None:
    torch.manual_seed(0)
    choice = f"int{bits}"
    coding, weight = coding_of(choice), torch.randn(4000)
    values = coding.simulate(weight, choice, coding.initial(weight, choice)).unique()
    assert len(values) <= 2**bits
    steps = values.diff()
    torch.testing.assert_close(steps, steps.min().expand_as(steps) * (steps / steps.min()).round())


def test_more_bits_mean_less_error_and_more_bytes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    errors, sizes = [], []
    for bits in range(2, 9):
        choice = f"int{bits}"
        parameters = coding_of(choice).initial(weight, choice)
        errors.append(float((coding_of(choice).simulate(weight, choice, parameters) - weight).square().mean()))
        sizes.append(len(encode_artifact({"w": Plan(weight, choice, parameters)}, Recipe())))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)


def test_four_bit_step_is_near_the_best_of_a_fine_grid() -> None:
    """Independent reference: brute force over 2,000 steps."""
    torch.manual_seed(0)
    weight = torch.randn(5000) * 0.3

    def error(step: float) -> float:
        return float(((weight / step).round().clamp(-8, 7) * step - weight).square().mean())

    best = min(error(float(weight.abs().max()) / 7 * k / 2000) for k in range(100, 2001))
    coding = coding_of("int4")
    got = coding.simulate(weight, "int4", coding.initial(weight, "int4"))
    assert float((got - weight).square().mean()) <= 1.02 * best
