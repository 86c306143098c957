"""What acts while a candidate is fine-tuned: regrowing, exchange, bounds, penalties, clip ranges, ranking."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import pack, unpack
from autocompress.divergence import divergence
from autocompress.errors import SpaceError
from autocompress.recipe import Choice, Recipe
from autocompress.space import SearchSpace
from autocompress.task import Calibration, Task
from autocompress.techniques.activation_bits import InputQuantizer
from autocompress.techniques.base import SparseLayer, coding_of, structures, trainings
from autocompress.techniques.clipping import clip_range
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune, step_costs
from autocompress.trial.workshop import Workshop
from tests.conftest import ZOO, small_digits, workshop_of, zoo_task

REGROW, EXCHANGE = trainings()["regrow"], trainings()["exchange"]


def candidate_of(task: Task, choices: dict[str, Choice]) -> Candidate:
    workshop = workshop_of(task)
    return Candidate(workshop.original, workshop.anatomy, Recipe.of(choices), workshop.calibration)


def tuned(task: Task, choices: dict[str, Choice], epochs: int = 4) -> Candidate:
    torch.manual_seed(0)
    candidate = candidate_of(task, choices)
    for _ in fine_tune(task, candidate, task.build(), epochs):
        pass
    return candidate


# ------------------------------------------------------------ regrow


def test_the_largest_gradients_grow_back_for_the_smallest_weights() -> None:
    weight = torch.tensor([5.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    gradient = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.1, -7.0, 0.2, 3.0])
    mask = weight != 0
    got = REGROW.regrown("gradient", mask, weight, gradient, 0.5)
    assert got.tolist() == [True, True, False, False, False, True, False, True]
    assert torch.equal(REGROW.regrown("none", mask, weight, gradient, 0.5), mask)
    torch.manual_seed(0)
    grown = [REGROW.regrown("random", mask, weight, gradient, 0.25)[4:].nonzero().item() for _ in range(60)]
    assert set(grown) == {0, 1, 2, 3}


@pytest.mark.parametrize("choice", ["gradient", "random"])
def test_regrowing_keeps_the_sparsity_and_changes_the_mask(choice: str) -> None:
    plain = tuned(small_digits(), {"1:sparsity": 0.9, "3:sparsity": 0.8})
    grown = tuned(small_digits(), {"1:sparsity": 0.9, "3:sparsity": 0.8, "model:regrow": choice})
    for name in ("1", "3"):
        one, other = plain.layers[name].mask, grown.layers[name].mask
        assert one is not None
        assert other is not None
        assert int(one.sum()) == int(other.sum())
        assert not torch.equal(one, other)
        assert bool((grown.layers[name].parameter[other == 0] == 0).all())


# ------------------------------------------------------------ exchange


def test_layers_exchange_sparsity_at_equal_bits() -> None:
    torch.manual_seed(0)
    even, heavy = torch.randn(40, 50), torch.randn(40, 50)
    heavy[:, 10:] *= 1e-3  # a fifth of the weights does all
    layers = [SparseLayer(even, 0.5, 4.0), SparseLayer(heavy, 0.5, 8.0)]
    shares = EXCHANGE.exchanged("magnitude", layers)
    assert shares[0] < 0.5 < shares[1]
    bits = [layer.bits * (1 - share) * layer.weight.numel() for layer, share in zip(layers, shares, strict=True)]
    assert sum(bits) == pytest.approx(0.5 * 2000 * 12, abs=8)
    assert EXCHANGE.exchanged("none", layers) == [0.5, 0.5]


def test_scores_are_those_of_lamp() -> None:
    """Independent reference: the definition, weight by weight."""
    from autocompress.techniques.exchange import _lamp

    torch.manual_seed(0)
    weight = torch.randn(30)
    expected = [float(w**2 / sum(v**2 for v in weight if abs(v) >= abs(w))) for w in weight]
    torch.testing.assert_close(_lamp(weight), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_exchange_holds_the_number_of_weights_while_fine_tuning() -> None:
    given = tuned(small_digits(), {"1:sparsity": 0.8, "3:sparsity": 0.8, "model:exchange": "magnitude"})
    shares = {name: float((given.layers[name].parameter == 0).float().mean()) for name in ("1", "3")}
    assert shares["1"] > 0.81
    assert shares["3"] < 0.78
    kept = sum(int(given.layers[name].parameter.count_nonzero()) for name in ("1", "3"))
    assert kept == pytest.approx(0.2 * sum(given.layers[name].parameter.numel() for name in ("1", "3")), abs=3)


# ------------------------------------------------------------ parts of the loss


def test_a_bound_on_the_divergence_is_held() -> None:
    drifts = []
    for bound in (0.0, 0.002):
        task = small_digits()
        candidate = tuned(task, {"1:weights": "int2", "3:weights": "int2", "model:kl_bound": bound}, epochs=8)
        batch = next(task.batches("train"))
        with torch.no_grad():
            output, reference = task.run(candidate.model, batch)[0], task.run(task.build(), batch)[0]
        drifts.append(float(divergence(output, reference, batch[1])))
    assert drifts[1] < 0.8 * drifts[0]


@pytest.mark.parametrize("choice", ["l1-0.05", "l2-0.05"])
def test_a_price_of_activity_lowers_it(choice: str) -> None:
    def activity(candidate: Candidate, task: Task) -> float:
        seen: list[float] = []
        for module in candidate.activations().values():
            module.register_forward_hook(lambda m, a, out: seen.append(float(out.abs().mean())))
        with torch.no_grad():
            task.run(candidate.model, next(task.batches("val")))
        assert len(seen) == 2
        return sum(seen)

    task = small_digits()
    free, priced = (tuned(task, {"model:activity_penalty": c}) for c in ("none", choice))
    assert activity(priced, task) < 0.9 * activity(free, task)


# ------------------------------------------------------------ clip ranges


def test_clip_ranges_of_known_values() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(20_000).relu(), torch.tensor([40.0])])
    assert list(map(float, clip_range(values, 15, "max"))) == [0, 40]
    for criterion, most in (("percentile", 5), ("mse", 20), ("kl", 8)):
        low, high = clip_range(values, 15, criterion)
        assert float(low) == 0
        assert 2 < float(high) < most, criterion
    low, high = clip_range(torch.linspace(-2, 6, 5000), 255, "mse")
    assert (float(low), float(high)) == pytest.approx((-2, 6), rel=0.01)


def test_the_range_of_least_squared_error_is_near_the_best_of_a_fine_grid() -> None:
    """Independent reference: brute force with numpy."""
    torch.manual_seed(0)
    values = torch.randn(4000).relu()
    _, high = clip_range(values, 7, "mse")
    data = values.numpy()

    def error(top: float) -> float:
        return float(((np.clip(np.round(data / top * 7), 0, 7) * top / 7 - data) ** 2).mean())

    best = min(error(top) for top in np.linspace(0.5, data.max(), 1000))
    assert error(float(high)) <= 1.05 * best


def test_the_range_of_least_divergence_is_that_of_the_definition() -> None:
    """Independent reference: the histograms of the paper, bin by bin."""
    from autocompress.techniques.clipping import _divergence

    torch.manual_seed(0)
    values = torch.randn(3000).abs()
    count = 375
    for top in (1.0, 2.0, 3.0):
        counts, _ = np.histogram(values.numpy(), count, (0, top))
        p = counts.astype(float)
        p[-1] += int((values > top).sum())
        levels = [round((i + 0.5) / count * 15) for i in range(count)]
        q = np.zeros(count)
        for level in range(16):
            bins = [i for i in range(count) if levels[i] == level and counts[i] > 0]
            for i in bins:
                q[i] = sum(counts[j] for j in bins) / len(bins)
        p, q = p / p.sum(), np.maximum(q, 1e-9) / np.maximum(q, 1e-9).sum()
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        assert float(_divergence(values, torch.tensor(0.0), torch.tensor(top), 15)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("clipping", ["mse", "kl", "max"])
@pytest.mark.parametrize("choice", ["int4", "int4-channel"])
def test_clipped_weights_keep_their_bits(clipping: str, choice: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4000).clamp(-3, 3)
    weight[:, 0] = 9
    coding = coding_of(choice)
    parameters = coding.initial(weight, choice, clipping)
    simulated = coding.simulate(weight, choice, parameters)
    assert all(len(row.unique()) <= 16 for row in simulated)
    largest = float(simulated.abs().max())
    assert (largest > 8) == (clipping == "max")


@pytest.mark.parametrize("clipping", ["max", "percentile", "mse", "kl", "learned"])
@pytest.mark.parametrize("name", ["mlp", "conv1d", "transformer"])
def test_activation_ranges_survive_training_and_the_file(clipping: str, name: str) -> None:
    task = zoo_task(name)
    inputs = workshop_of(task).anatomy.inputs
    candidate = tuned(task, {f"{i}:activation_bits": 4 for i in inputs} | {"model:activation_clipping": clipping}, 2)
    decoded = unpack(pack(candidate.weights(), candidate.recipe), ZOO[name][0])
    batch = next(task.batches("val"))
    seen: list[int] = []
    for module in decoded.modules():
        if isinstance(module, InputQuantizer):
            module.register_forward_hook(lambda m, a, out: seen.append(len(out.unique())))
    with torch.no_grad():
        got, expected = task.run(decoded, batch)[0], task.run(candidate.model, batch)[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert len(seen) == len(inputs)
    assert max(seen) <= 16


def test_learned_ranges_are_trained() -> None:
    """Gradients as in LSQ+: values beyond the range push its end, those within pull by their rounding."""
    quantizer = InputQuantizer(2)
    quantizer.clipping = "learned"
    quantizer.train()
    quantizer(torch.linspace(0, 3, 100))
    assert quantizer.high.requires_grad
    assert not quantizer.low.requires_grad
    with torch.no_grad():
        quantizer.high.fill_(3.0)
    x = torch.tensor([5.0, 1.2, -1.0], requires_grad=True)
    torch.autograd.backward(quantizer(x).sum())
    assert quantizer.high.grad is not None
    assert float(quantizer.high.grad) == pytest.approx(1 + (1 - 1.2) / 3, abs=1e-5)
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]


# ------------------------------------------------------------ ranking and importance of channels


def two_groups() -> tuple[nn.Module, torch.Tensor]:
    """Of the first hidden layer six of eight channels do nothing, of the second none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[2:] *= 1e-4
        model[0].bias[2:] = -1e-4
        model[2].weight[:, 2:] *= 1e-4
    return model, torch.randn(64, 8)


@pytest.mark.parametrize("criterion", ["l2", "taylor", "kl"])
def test_in_a_global_ranking_the_useless_group_pays(criterion: str) -> None:
    widths = {}
    for ranking in ("local", "global"):
        model, inputs = two_groups()
        task = Task(model, [(inputs, model(inputs).argmax(1))], [], [])
        run = Calibration(task, list(task.batches("train")))
        structures()["channels"].apply(model, {"0": 5, "2": 5}, run, {"ranking": ranking, "importance": criterion})
        widths[ranking] = [model[0].out_features, model[2].out_features]
    assert widths["local"] == [5, 5]
    assert widths["global"][0] < 5 < widths["global"][1]
    assert sum(widths["global"]) in (9, 10, 11)


@pytest.mark.parametrize("criterion", ["taylor", "gates"])
def test_criteria_of_the_loss_find_the_channel_that_it_needs_least(criterion: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[:, 3] = 1e-6  # large weights into it, but nothing comes out
        model[0].weight[3] *= 5
    inputs = torch.randn(256, 6)
    task = Task(model, [(inputs, model(inputs).argmax(1))], [], [])
    run = Calibration(task, list(task.batches("train")))
    before = float(run.loss(model).detach())
    structures()["channels"].apply(model, {"0": 7}, run, {"importance": criterion})
    assert float(run.loss(model).detach()) <= before + 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("criterion", trainings()["importance"].examples())
def test_every_criterion_ranks_the_channels_of_a_model_of_half_precision(criterion: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    inputs = torch.randn(64, 6).bfloat16()
    task = Task(model, [(inputs, model(inputs).argmax(1))], [], [])
    made = structures()["channels"].apply(
        model, {"0": 5}, Calibration(task, list(task.batches("train"))), {"importance": criterion}
    )
    assert made[0].weight.shape == (5, 6)
    assert made(inputs).dtype == torch.bfloat16


# ------------------------------------------------------------ precision


def test_a_step_in_bfloat16_keeps_less_for_the_backward_pass() -> None:
    task = zoo_task("unet")
    workshop = workshop_of(task)
    recipe = Recipe.of({"model:precision": "bfloat16"})
    costs = step_costs(
        Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration), workshop.calibration
    )
    assert set(costs) == {"float32", "bfloat16"}
    assert 0 < costs["bfloat16"]["saved_bytes"] < 0.8 * costs["float32"]["saved_bytes"]
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert step_costs(candidate_of(task, {}), workshop.calibration) == {}


def test_bad_choices_are_named() -> None:
    wrong = {"regrow": "all", "exchange": 1, "ranking": "both", "kl_bound": -1, "activity_penalty": "l3-1"}
    wrong |= {"weight_clipping": "percentile", "activation_clipping": "none"}
    for name, raw in wrong.items():
        with pytest.raises(SpaceError, match=f"choice {raw!r} does not exist"):
            trainings()[name].parse(raw)


class Average(nn.Module):
    """Keeps a mean of its features, in float32: there is no autocast for that."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x).relu()
        if self.training:
            self.mean.lerp_(y.detach().mean(0), 0.1)
        out: Tensor = self.head(y - self.mean)
        return out


def test_a_precision_with_which_the_model_does_not_train_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    space = SearchSpace.parse(
        "{layers: {'*': {weights: [int8, int4]}}, model: {precision: [float32, bfloat16], rate_penalty: [0, 1]}}"
    )
    offered = dict[str, list[tuple[Choice, ...]]]()
    for name, model in (("whole", nn.Sequential(nn.Linear(8, 3), nn.Sigmoid())), ("average", Average())):
        batches = [(torch.randn(8, 8), torch.rand(8, 3)) for _ in range(2)]
        # which autocast refuses, so it sees float32
        loss = nn.functional.binary_cross_entropy if name == "whole" else nn.functional.mse_loss
        task = Task(model, batches, batches, batches, loss=loss, metric=lambda output, target: 1.0)
        workshop = Workshop.on(task, space, tmp_path)
        offered[name] = [d.choices for d in workshop.space if d.name == "precision"]
        assert "rate_penalty" in {d.name for d in workshop.space}
        assert not workshop.original.training
    assert offered == {"whole": [("float32", "bfloat16")], "average": []}
