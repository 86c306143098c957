"""Compression without training: layers' outputs are those of the original's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autocompress as ac
from autocompress.artifact import load
from autocompress.files import ARTIFACT
from autocompress.recipe import Recipe
from autocompress.space import BoundSpace, SearchSpace
from autocompress.task import Task, measure
from autocompress.trial.compression import Candidate
from autocompress.trial.matrix import MOST_ROWS
from autocompress.trial.reconstruction import _damping, _Fit, _refitted, reconstruct
from autocompress.trial.workshop import Workshop
from tests.conftest import ZOO, small_digits, zoo_task

Choices = dict[str, Any]


def correlated(rows: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)


def workshop_of(task: Task, folder: Path) -> Workshop:
    return Workshop(task, task.build(), SearchSpace.named("default"), folder, 0)


def candidate_of(workshop: Workshop, choices: Choices, fitted: bool = True) -> Candidate:
    """All layers by these choices."""
    recipe = Recipe.of({f"{layer.name}:{name}": c for layer in workshop.anatomy.layers for name, c in choices.items()})
    candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
    if fitted:
        reconstruct(candidate, workshop.samples)
    candidate.materialise()
    return candidate


def one_layer(folder: Path, layer: nn.Linear, x: Tensor) -> Workshop:
    batches = [(x, torch.zeros(len(x), layer.out_features))]
    task = Task(
        nn.Sequential(layer),
        batches,
        batches,
        batches,
        loss=lambda output, target: (output - target).square().mean(),
        metric=lambda output, target: -float((output - target).square().mean()),
        epochs=0,
    )
    return Workshop(task, task.build(), BoundSpace(()), folder, 0)


def hessian_of(x: Tensor) -> np.ndarray[Any, Any]:
    h = (x.T @ x).double()[None]
    damping = _damping(_Fit(torch.tensor([len(x)]), h, h, x.double().mean(0)[None], h[:, 0]))
    return (h + torch.eye(h.shape[1]) * damping)[0].numpy()


def test_what_stays_of_pruned_outputs_is_the_least_squares_solution(tmp_path: Path) -> None:
    """Against the normal equations of each output alone."""
    x, layer = correlated(384, 24), nn.Linear(24, 7, bias=False)
    fitted = candidate_of(one_layer(tmp_path, layer, x), {"sparsity": 0.5}).model
    found, h, weight = fitted[0].weight.detach().numpy(), hessian_of(x), layer.weight.detach().double().numpy()
    assert (found == 0).mean() == 0.5
    for row, whole in zip(found, weight, strict=True):
        stays = np.flatnonzero(row)
        np.testing.assert_allclose(row[stays], np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ whole), atol=1e-4)


def test_inputs_far_from_zero_are_no_worse(tmp_path: Path) -> None:
    """Their mean is taken out of products that are ten orders of magnitude larger than what is left."""
    x, layer = correlated(384, 24), nn.Linear(24, 7)
    off = []
    for shift in (0.0, 100_000.0):
        fitted = candidate_of(one_layer(tmp_path, layer, x + shift), {"sparsity": 0.5}).model[0]
        moved = fitted.weight.double() - layer.weight.double()
        outputs = (x + shift).double() @ moved.T + fitted.bias.double() - layer.bias.double()
        off.append(outputs.square().mean().item())
    assert off[1] < 1.2 * off[0]


class Constant(nn.Module):
    """Its head is given the same whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(24, 48), nn.Linear(48, 7)
        nn.init.zeros_(self.into.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.into(x))
        return out


def test_inputs_that_never_change_move_nothing_but_the_bias(tmp_path: Path) -> None:
    """What is left of them when their mean is taken out is round-off, of any sign."""
    torch.manual_seed(0)
    x, model = correlated(5000, 24), Constant()
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    workshop = workshop_of(Task(model, batches, batches, batches, epochs=0), tmp_path)
    fitted = candidate_of(workshop, {"weights": "int3"}).model
    torch.testing.assert_close(fitted(x), model(x), atol=1e-4, rtol=1e-4)
    rounded = candidate_of(workshop, {"weights": "int3"}, fitted=False).model
    torch.testing.assert_close(fitted.head.weight, rounded.head.weight, atol=0.1, rtol=0.1)


def test_conjugate_gradients_leave_what_is_asked_for_alone() -> None:
    x = correlated(500, 10).double()
    weight, products = torch.randn(1, 4, 10, dtype=torch.float64), (x.T @ x)[None]
    torch.testing.assert_close(_refitted(weight, products, torch.ones(1, 4, 10, dtype=torch.bool)), weight)
    assert _refitted(weight, products, torch.zeros(1, 4, 10, dtype=torch.bool)).count_nonzero() == 0


@pytest.mark.parametrize(
    "choices",
    [{"weights": "int3"}, {"weights": "ternary"}, {"sparsity": 0.5}, {"weights": "codebook-8", "sparsity": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("name", ZOO)
def test_any_model_says_more_of_what_it_said_than_when_it_is_only_rounded(
    name: str, choices: Choices, tmp_path: Path
) -> None:
    workshop = workshop_of(zoo_task(name, epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, choices, fitted).model for fitted in (True, False))
    off = np.zeros(2)
    with torch.no_grad():
        for split in ("val", "test"):
            (x, _) = next(workshop.task.batches(split))
            args = x if isinstance(x, tuple) else (x,)
            off += [float((model(*args) - workshop.original(*args)).square().mean()) for model in (fitted, rounded)]
    assert off[0] < off[1]


class Loop(nn.Module):
    """Runs its layers once for each step; what comes next computes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back, self.head = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            state = self.into(step).add_(self.back(state)).relu_()
        out: Tensor = self.head(state)
        return out


def test_what_runs_more_than_once_is_fitted_to_all_of_its_runs(tmp_path: Path) -> None:
    """Without errors before it, what a pruned layer keeps is the least-squares solution over all steps."""
    torch.manual_seed(0)
    batches = [(torch.randn(64, 6, 8), torch.zeros(64, dtype=torch.long))]
    workshop = workshop_of(Task(Loop(), batches, batches, batches, epochs=0), tmp_path)
    recipe = Recipe.of({"into:sparsity": 0.5})
    candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
    reconstruct(candidate, workshop.samples)
    found, whole = (m.into.weight.detach().double().numpy() for m in (candidate.model, workshop.original))
    rows = batches[0][0].flatten(0, 1)
    h = hessian_of(rows - rows.mean(0))
    for row, dense in zip(found, whole, strict=True):
        stays = np.flatnonzero(row)
        np.testing.assert_allclose(row[stays], np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ dense), atol=1e-3)


class Words(nn.Module):
    """shares: the head has the weight of the embedding, as one of its own, computes with that, or has another."""

    def __init__(self, shares: str = "") -> None:
        super().__init__()
        self.table, self.shares = nn.Embedding(50, 16), shares
        self.middle = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        if self.shares != "computes":
            self.head = nn.Linear(16, 50, bias=False)
        if self.shares == "has":
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        mean = self.middle(self.table(ids).mean(1))
        out: Tensor = mean @ self.table.weight.T if self.shares == "computes" else self.head(mean)
        return out


def words() -> Tensor:
    often, seldom = torch.randint(0, 10, (256, 9)), torch.randint(10, 50, (256, 1))
    return torch.cat([often, seldom], 1)


def test_rows_of_an_embedding_that_are_looked_up_often_keep_more_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(words(), torch.zeros(256, dtype=torch.long))]
    workshop = workshop_of(Task(Words(), batches, batches, batches, epochs=0), tmp_path)
    kept = candidate_of(workshop, {"sparsity": 0.7}).model.table.weight != 0
    assert kept.float().mean() == pytest.approx(0.3, abs=0.01)
    assert kept[:10].float().mean() > 0.6
    assert kept[10:].any(), "what is seldom seen is not what is never seen"


@pytest.mark.parametrize("shares", ["has", "computes"])
def test_an_embedding_that_is_the_matrix_of_an_output_is_fitted_to_what_that_says(shares: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(words(), torch.zeros(256, dtype=torch.long)) for _ in range(2)]
    workshop = workshop_of(Task(Words(shares), batches[:1], batches[1:], batches[1:], epochs=0), tmp_path)
    candidate, rounded = (candidate_of(workshop, {"sparsity": 0.5}, fit) for fit in (True, False))
    kept = candidate.model.table.weight != 0
    assert kept.float().mean() == pytest.approx(0.5, abs=0.01)
    (ids, _), model = batches[1], workshop.original
    with torch.no_grad():
        off = [float((other.model(ids) - model(ids)).square().mean()) for other in (candidate, rounded)]
    assert off[0] < 0.5 * off[1]


class Places(nn.Embedding):
    """Is given a mask, not places (OPT's learned positions)."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward((mask.cumsum(1) * mask).long())


def test_tables_with_a_forward_of_their_own_are_pruned_by_magnitude(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.rand(64, 9), torch.zeros(64, dtype=torch.long))]
    model = nn.Sequential(Places(50, 16), nn.Flatten(), nn.Linear(144, 4))
    workshop = workshop_of(Task(model, batches, batches, batches, epochs=0), tmp_path)
    table = candidate_of(workshop, {"sparsity": 0.5}).model[0].weight
    gone = model[0].weight[table == 0].abs()
    assert len(gone) == table.numel() // 2
    assert gone.max() <= table[table != 0].abs().min()


class Weighed(nn.Module):
    """Of the outputs of its first layer the second half counts for a tenth."""

    def __init__(self, differentiable: bool) -> None:
        super().__init__()
        self.differentiable, self.into, self.head = differentiable, nn.Linear(24, 40), nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            y = self.into(x)
            out: Tensor = self.head(torch.cat([y[:, :20], y[:, 20:] * 0.1], 1))
        return out


@pytest.mark.parametrize("differentiable", [True, False])
def test_outputs_that_the_model_hardly_listens_to_lose_more_weights(differentiable: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(192, 24), torch.zeros(192, dtype=torch.long))]
    workshop = workshop_of(Task(Weighed(differentiable), batches, batches, batches, epochs=0), tmp_path)
    zeros = (candidate_of(workshop, {"sparsity": 0.5}).model.into.weight == 0).float().mean(1)
    assert zeros.mean() == pytest.approx(0.5, abs=0.01)
    if differentiable:
        assert zeros[20:].mean() > 1.4 * zeros[:20].mean()
    else:
        assert zeros[20:].mean() == pytest.approx(float(zeros[:20].mean()), abs=0.1)


def test_what_is_not_asked_to_change_stays(tmp_path: Path) -> None:
    workshop = workshop_of(zoo_task("residual", epochs=0), tmp_path)
    (x, _) = next(workshop.task.batches("val"))
    with torch.no_grad():
        torch.testing.assert_close(candidate_of(workshop, {}).model(x), workshop.original(x), rtol=1e-4, atol=1e-5)


def test_channels_have_the_mean_and_the_variance_that_they_had(tmp_path: Path) -> None:
    workshop = workshop_of(zoo_task("residual", epochs=0), tmp_path)
    (x, _) = next(workshop.task.batches("train"))
    seen: dict[nn.Module, Tensor] = {}
    models = [workshop.original, candidate_of(workshop, {"sparsity": 0.7}).model]
    for model in models:
        model.norm2.register_forward_hook(lambda module, args, output: seen.update({module: output}))
        with torch.no_grad():
            model(x)
    was, now = (torch.var_mean(seen[model.norm2], (0, 2, 3)) for model in models)
    torch.testing.assert_close(now, was, rtol=1e-3, atol=1e-3)
    workshop.original.norm2._forward_hooks.clear()


@pytest.mark.parametrize("name", ["residual", "depthwise", "conv1d", "transformer", "lstm", "unet"])
def test_a_model_of_fewer_channels_is_fitted_as_far_as_it_says_the_same(name: str, tmp_path: Path) -> None:
    workshop = workshop_of(zoo_task(name, epochs=0), tmp_path)
    choices = {f"{group.name}:channels": 0.5 for group in workshop.anatomy.groups}
    recipe = Recipe.of({f"{layer.name}:weights": "int4" for layer in workshop.anatomy.layers} | choices)
    candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
    before = {name: tensor.clone() for name, tensor in candidate.model.state_dict().items()}
    reconstruct(candidate, workshop.samples)
    after = candidate.model.state_dict()
    assert [t.shape for t in after.values()] == [t.shape for t in before.values()]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_no_more_samples_are_run_than_a_layer_needs(tmp_path: Path) -> None:
    """One sample has 64 rows of the convolution, and one of the linear layer."""
    layers = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(320, 4, bias=False)
    batches = [(torch.randn(100, 3, 8, 8), torch.randint(4, (100,))) for _ in range(3)]
    workshop = workshop_of(Task(nn.Sequential(*layers), batches, batches, batches, epochs=0), tmp_path)
    ran: list[int] = []
    candidate, later = (candidate_of(workshop, {"weights": bits}, fitted=False) for bits in ("int3", "int4"))
    samples = workshop.samples
    workshop.original[0].register_forward_hook(lambda module, args, output: ran.append(len(output)))
    reconstruct(candidate, samples)
    looked_at = 2
    assert [n for n in ran if n > looked_at] == [100, 100, MOST_ROWS // 64 - 200, 100, 100, 100]
    ran.clear()
    reconstruct(later, samples)  # what the original's head is given in the whole third batch is known by now
    assert [n for n in ran if n > looked_at] == [100, 100, MOST_ROWS // 64 - 200, 100, 100]


class Routed(nn.Module):
    """Its second layer is given what begins with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.expert, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = self.into(x), x[:, 0] > 0
        out: Tensor = self.head(y.index_add(0, chosen.nonzero()[:, 0], self.expert(y[chosen])))
        return out


def test_a_layer_that_is_given_nothing_at_first_is_fitted_to_what_comes_later(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 16), torch.randint(4, (64,))) for _ in range(3)]
    batches[0][0][:, 0] = -1
    workshop = workshop_of(Task(Routed(), batches, batches, batches, epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, {"sparsity": 0.5}, fit).model for fit in (True, False))
    assert not torch.equal(fitted.expert.weight, rounded.expert.weight)


class Bmm(nn.Module):
    """Four experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Chosen(nn.Module):
    """Four experts in one tensor, one of which is chosen for each sample; nobody chooses the last."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(64, 3), nn.Parameter(torch.randn(4, 32, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        choice = self.gate(x).argmax(1)
        out = x.new_zeros(len(x), 32)
        for expert in choice.unique():
            at = (choice == expert).nonzero()[:, 0]
            out.index_add_(0, at, nn.functional.linear(x[at], self.weight[expert]))
        return out


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 4) / 6), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.into, self.experts, self.out = nn.Linear(16, 64), experts, Head()

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x).relu()
        if isinstance(self.experts, Bmm):
            y = self.experts(y.view(-1, 4, 16).transpose(0, 1)).transpose(0, 1).flatten(1)
        else:
            y = self.experts(y)
        out: Tensor = self.out(y)
        return out


@pytest.mark.parametrize(
    ("choices", "experts"), [({"weights": "int3"}, Bmm), ({"sparsity": 0.5}, Bmm), ({"sparsity": 0.5}, Chosen)], ids=str
)
def test_products_of_rows_and_weights_are_fitted(
    choices: Choices, experts: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    mixed = torch.randn(16, 16)
    batches = [(torch.randn(256, 16) @ mixed, torch.randint(4, (256,))) for _ in range(3)]
    workshop = workshop_of(Task(Mixture(experts()), batches[:2], batches[2:], batches[2:], epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, choices, fit).model for fit in (True, False))
    (x, _), model = batches[2], workshop.original
    with torch.no_grad():
        off = [float((other(x) - model(x)).square().mean()) for other in (fitted, rounded)]
    assert off[0] < 0.7 * off[1]
    for name in ("experts", "out"):
        assert not torch.equal(getattr(fitted, name).weight, getattr(rounded, name).weight), name


class Placed(nn.Module):
    """Adds a table of its own to what comes in, before the layers within see it."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.place).mean(1)
        return out


def test_layers_make_good_for_what_is_used_before_them_and_cannot_be_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixed = torch.randn(16, 16) / 4
    batches = [(torch.randn(256, 8, 16) @ mixed, torch.randint(4, (256,))) for _ in range(3)]
    workshop = workshop_of(Task(Placed(), batches[:2], batches[2:], batches[2:], epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, {"weights": "int2"}, fit).model for fit in (True, False))
    assert torch.equal(fitted.place, rounded.place)
    (x, _), model = batches[2], workshop.original
    with torch.no_grad():
        off = [float((other(x) - model(x)).square().mean()) for other in (fitted, rounded)]
    assert off[0] < 0.7 * off[1]


class Whole(nn.Module):
    """Runs with batches of 64 only."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.into(x.view(64, 16)).relu())
        return out


def test_a_model_of_whole_batches_is_fitted_to_whole_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 16), torch.randint(4, (64,))) for _ in range(3)]
    workshop = workshop_of(Task(Whole(), batches, batches, batches, epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, {"sparsity": 0.5}, fit).model for fit in (True, False))
    for name in ("into", "head"):
        assert not torch.equal(getattr(fitted, name).weight, getattr(rounded, name).weight), name


class Twice(nn.Module):
    """One layer that runs twice, one that shares its weight, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.tied, self.other, self.idle, self.head = (nn.Linear(16, 16) for _ in range(5))
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.other(self.tied(self.again(self.again(x)).relu()).relu()))
        return out


def test_layers_that_cannot_be_fitted_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 16), torch.randint(16, (64,))) for _ in range(3)]
    workshop = workshop_of(Task(Twice(), batches, batches, batches, epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, {"weights": "int3"}, fit).model for fit in (True, False))
    for name in ("again", "tied", "idle"):
        assert torch.equal(getattr(fitted, name).weight, getattr(rounded, name).weight), name
    assert not torch.equal(fitted.head.weight, rounded.head.weight)


class Same(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """Its weights are made even before they are used."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean, deviation = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, (weight - mean) / deviation, bias)


class Named(nn.Linear):
    """Without a forward of its own."""


def test_layers_with_a_forward_of_their_own_are_fitted_if_it_takes_their_weight_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = Same(3, 8, 3, stride=2), nn.ReLU(), Standardised(8, 8, 3), nn.Flatten(), Named(32, 4)
    batches = [(torch.randn(64, 3, 8, 8), torch.randint(4, (64,))) for _ in range(3)]
    workshop = workshop_of(Task(nn.Sequential(*layers), batches, batches, batches, epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, {"sparsity": 0.5}, fit).model for fit in (True, False))
    same = [torch.equal(fitted[at].weight, rounded[at].weight) for at in (0, 2, 4)]
    assert same == [False, True, False]


class Windows(nn.Module):
    """Computes with the weights of layers that never run, as attention in torchvision does, and makes a bias itself."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.query, self.value = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.query, torch.zeros(16), self.value])
        q, k, v = nn.functional.linear(x, self.into.weight, bias).chunk(3, -1)
        y = torch.softmax(q @ k.mT, -1) @ v
        return nn.functional.linear(y, self.proj.weight, self.proj.bias)


def test_layers_that_others_compute_with_are_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Windows(), nn.Flatten(), nn.Linear(96, 4))
    batches = [(torch.randn(64, 6, 8), torch.randint(4, (64,))) for _ in range(3)]
    workshop = workshop_of(Task(model, batches, batches, batches, epochs=0), tmp_path)
    fitted, rounded = (candidate_of(workshop, {"sparsity": 0.5}, fit).model for fit in (True, False))
    for layer in ("into", "proj"):
        assert not torch.equal(getattr(fitted[1], layer).weight, getattr(rounded[1], layer).weight), layer
    with torch.no_grad():
        outputs = [part[:2](batches[2][0]) for part in (model, fitted, rounded)]
    assert (outputs[1] - outputs[0]).norm() < 0.75 * (outputs[2] - outputs[0]).norm()


def test_a_trial_without_training_keeps_most_of_what_rounding_loses(tmp_path: Path) -> None:
    """And does not depend on a parent."""
    task = small_digits(epochs=0)
    workshop = workshop_of(task, tmp_path)
    chosen: Choices = {"weights": "int4", "sparsity": 0.8}
    recipe = workshop.space.recipe({d.key: chosen[d.name] for d in workshop.space if d.name in chosen})
    first, second = workshop.finish(0, recipe), workshop.finish(1, recipe, parent=0)
    assert (first.size_bytes, first.val_accuracy) == (second.size_bytes, second.val_accuracy)
    assert first.estimated_bytes == pytest.approx(first.size_bytes, rel=0.03)
    decoded = load(tmp_path / "trials" / "0" / ARTIFACT, task.build)
    assert measure(task, decoded, "val") == first.val_accuracy
    rounded = measure(task, candidate_of(workshop, chosen, fitted=False).model, "val")
    whole = measure(task, workshop.original, "val")
    assert whole - first.val_accuracy < 0.3 * (whole - rounded)


@pytest.mark.usefixtures("without_ray")
def test_a_search_without_training_has_nothing_to_choose_of_training(tmp_path: Path) -> None:
    front = ac.search("tests.mini:task", 8, epochs=0, run=tmp_path / "run", workers=1, quiet=True)
    assert (tmp_path / "run" / "config.yaml").read_text().count("epochs: 0") == 1
    chosen = {name for point in front.points for _, name, _ in Recipe.from_json(point.recipe)}
    assert not chosen & {"learning_rate", "precision"}
    again = ac.resume(tmp_path / "run", budget=10, workers=1, quiet=True)
    assert len(list((tmp_path / "run" / "trials").iterdir())) == 10
    assert len(again.points) >= len(front.points) - 1
