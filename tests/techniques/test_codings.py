"""What every coding promises, whatever it does inside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.artifact.container import Plan, decode_artifact, encode_artifact
from autocompress.recipe import Choice, Recipe
from autocompress.techniques.base import IntegerCoding, coding_choices, coding_of

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
    if "filters" not in choice:  # where rows are shared, a weight is zero when those of all members are
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
        assert (parameters.grad[: coding.stored(choice, (20, 20))] != 0).float().mean() > 0.5


@pytest.mark.parametrize("choice", ["int2", "int4", "int4-channel", "int8"])
def test_integers_have_the_gradients_of_learned_step_sizes(choice: str) -> None:
    """Against automatic differentiation through rounding that counts as the identity (Esser et al., 2020)."""
    torch.manual_seed(0)
    coding, weight, onward = coding_of(choice), torch.randn(12, 20), torch.randn(12, 20)
    steps = coding.initial(weight, choice) - 0.7  # small steps: some weights lie beyond the largest code

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()

    gradients = []
    for simulated in (True, False):
        w, logarithm = weight.clone().requires_grad_(), steps.clone().requires_grad_()
        if simulated:
            out = coding.simulate(w, choice, logarithm)
        else:
            step = torch.exp2(rounded(logarithm * 32) / 32)[:, None]
            half = 2 ** (int(choice[3]) - 1)
            out = rounded((w / step).clamp(-half, half - 1)) * step
        torch.autograd.backward(out, onward)
        gradients.append((w.grad, logarithm.grad))
    for got, expected in zip(*gradients, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_float32_is_the_identity() -> None:
    weight = torch.randn(6, 6)
    assert torch.equal(coding_of("float32").simulate(weight, "float32", torch.empty(0)), weight)


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float8-e4m3", "float8_e4m3fn"),
        ("float8-e5m2", "float8_e5m2"),
    ],
)
def test_floats_round_as_torch_does(choice: str, dtype: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000)
    expected = weight.to(getattr(torch, dtype)).float()
    got = coding_of(choice).simulate(weight, choice, torch.empty(0))
    torch.testing.assert_close(got, expected, rtol=2**-8 if choice == "bfloat16" else 0, atol=0)
    assert coding_of(choice).simulate(torch.tensor([1e9]), choice, torch.empty(0)).isfinite().all()


@pytest.mark.parametrize(("choice", "values"), [("binary", 2), ("ternary", 3), ("codebook-4", 4), ("codebook-16", 16)])
def test_few_values(choice: str, values: int) -> None:
    torch.manual_seed(0)
    coding, weight = coding_of(choice), torch.randn(30, 40)
    simulated = coding.simulate(weight, choice, coding.initial(weight, choice))
    assert len(simulated.unique()) == values
    assert bool((simulated * weight >= 0).all()), "no weight changes its sign"


def test_binary_and_ternary_scales_are_those_of_the_papers() -> None:
    """XNOR-Net: the mean magnitude. TWN: the mean magnitude of what is above 0.7 mean magnitudes."""
    torch.manual_seed(0)
    weight = torch.randn(5000)
    binary = coding_of("binary").simulate(weight, "binary", coding_of("binary").initial(weight, "binary"))
    torch.testing.assert_close(binary.abs(), weight.abs().mean().expand(5000), rtol=0.012, atol=0)
    ternary = coding_of("ternary").simulate(weight, "ternary", coding_of("ternary").initial(weight, "ternary"))
    above = weight > 0.7 * weight.abs().mean()
    assert torch.equal(ternary > 0, above)
    torch.testing.assert_close(ternary.max(), weight[above].mean(), rtol=0.012, atol=0)


def test_binary_and_ternary_are_small_before_any_entropy_coding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 200)
    for choice, most in (("binary", 1.0), ("ternary", 1.6)):
        data = encode_artifact({"w": Plan(weight, choice, coding_of(choice).initial(weight, choice))}, Recipe())
        assert 8 * len(data) / weight.numel() <= most + 0.02


def test_a_codebook_is_near_k_means() -> None:
    """Independent reference: scikit-learn."""
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    weight = torch.randn(3000)
    coding = coding_of("codebook-8")
    got = coding.simulate(weight, "codebook-8", coding.initial(weight, "codebook-8"))
    best = KMeans(8, n_init=3, random_state=0).fit(weight[:, None].numpy()).inertia_
    assert float((got - weight).square().sum()) <= 1.15 * best


def test_a_shared_value_moves_by_the_sum_of_its_weights() -> None:
    coding, weight = coding_of("codebook-4"), torch.tensor([-1.0, -1.0, 1.0, 2.0])
    parameters = torch.tensor([-1.0, 1.0, 2.0], requires_grad=True)
    torch.autograd.backward(coding.simulate(weight, "codebook-4", parameters).sum())
    assert parameters.grad is not None
    assert parameters.grad.tolist() == [2, 1, 1]


def test_filters_are_shared_and_the_file_holds_each_once() -> None:
    """Independent reference: the means of scikit-learn's clusters, before they are rounded to 4 bits."""
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    kinds = torch.randn(8, 4, 3, 3)
    weight = kinds[torch.arange(32) % 8] + 0.01 * torch.randn(32, 4, 3, 3)
    coding = coding_of("filters-0.25")
    parameters = coding.initial(weight, "filters-0.25")
    simulated = coding.simulate(weight, "filters-0.25", parameters)
    assert len(simulated.flatten(1).unique(dim=0)) == 8
    best = KMeans(8, n_init=3, random_state=0).fit(weight.flatten(1).numpy())
    expected = torch.from_numpy(best.cluster_centers_[best.labels_]).view_as(weight)
    step = float(torch.exp2(parameters[0]))
    assert (simulated - expected.clamp(-8 * step, 7 * step)).abs().max() <= 0.51 * step
    own = len(encode_artifact({"w": Plan(weight, "int4", coding_of("int4").initial(weight, "int4"))}, Recipe()))
    shared = len(encode_artifact({"w": Plan(weight, "filters-0.25", parameters)}, Recipe()))
    assert shared < 0.5 * own


def test_a_step_for_each_channel_fits_channels_of_different_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 50) * torch.logspace(-2, 1, 8)[:, None]
    errors = []
    for choice in ("int4", "int4-channel"):
        coding = coding_of(choice)
        simulated = coding.simulate(weight, choice, coding.initial(weight, choice))
        errors.append(float(((simulated - weight).square().sum(1) / weight.square().sum(1)).mean()))
        assert all(len(row.unique()) <= 16 for row in simulated)
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("choice", [c for c in CHOICES if coding_of(c).layout(c)[0] == 0])
def test_scaled_rounds_to_the_code(choice: str) -> None:
    """What the rate model counts is what the file stores."""
    torch.manual_seed(0)
    coding, weight = coding_of(choice), torch.randn(20, 30)
    assert isinstance(coding, IntegerCoding)
    parameters = coding.initial(weight, choice)
    largest = 1 << coding.layout(choice)[1]
    counted = coding.scaled(weight, choice, parameters).clamp(-largest, largest).round()
    codes = torch.from_numpy(coding.encode(weight, choice, parameters).codes)
    assert (counted - codes).abs().max() <= 1
    assert (counted == codes).float().mean() > 0.97


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
