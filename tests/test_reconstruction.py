"""Compression without training: layers say what the original's say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autocompress as ac
from autocompress.artifact import load
from autocompress.compression import Candidate
from autocompress.recipe import Recipe
from autocompress.reconstruction import _damping, _Fit, _refitted, _rows, reconstruct
from autocompress.space import BoundSpace, SearchSpace
from autocompress.task import Task, measure
from autocompress.trial import ARTIFACT, Workshop
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
        reconstruct(workshop.task, candidate, workshop.original, workshop.prober.can_replay)
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
    h = (x.T @ x).double()
    return (h + torch.eye(len(h)) * _damping(_Fit(len(x), h, h, h[0], h[0]))).numpy()


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
    near, far = (
        candidate_of(one_layer(tmp_path, layer, x + shift), {"sparsity": 0.5}).model for shift in (0.0, 100_000.0)
    )
    assert torch.equal(near[0].weight == 0, far[0].weight == 0)
    torch.testing.assert_close(far[0].weight, near[0].weight, rtol=0.05, atol=0.01)


def test_conjugate_gradients_leave_what_is_asked_for_alone() -> None:
    x = correlated(500, 10).double()
    weight = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(_refitted(weight, x.T @ x, torch.ones(4, 10, dtype=torch.bool)), weight)
    assert _refitted(weight, x.T @ x, torch.zeros(4, 10, dtype=torch.bool)).count_nonzero() == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 0), bias=False),
        nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(3, 5, 4, padding="same", padding_mode="circular"),
        nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2),
        nn.Linear(9, 5),
    ],
    ids=str,
)
def test_a_layer_is_its_matrix_times_its_rows(layer: Any) -> None:
    x = torch.randn({nn.Linear: (2, 6, 9), nn.Conv1d: (2, 3, 9), nn.Conv2d: (2, 3, 8, 9)}[type(layer)])
    product = _rows(layer, x) @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    said = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    torch.testing.assert_close(product.view(said.shape), said)


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
    (x, _), off = next(workshop.task.batches("val")), []
    args = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        for fitted in (True, False):
            model = candidate_of(workshop, choices, fitted).model
            off.append(float((model(*args) - workshop.original(*args)).square().mean()))
    assert off[0] < off[1]


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


def test_no_more_samples_are_run_than_a_layer_needs(tmp_path: Path) -> None:
    """27 inputs want 432 rows; one sample has 64 of them."""
    layers = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(320, 4, bias=False)
    batches = [(torch.randn(100, 3, 8, 8), torch.randint(4, (100,))) for _ in range(3)]
    workshop = workshop_of(Task(nn.Sequential(*layers), batches, batches, batches, epochs=0), tmp_path)
    ran: list[int] = []
    candidate = candidate_of(workshop, {"weights": "int3"}, fitted=False)
    replays = workshop.prober.can_replay
    workshop.original[0].register_forward_hook(lambda module, args, output: ran.append(len(output)))
    reconstruct(workshop.task, candidate, workshop.original, replays)
    looked_at = 2
    assert [n for n in ran if n > looked_at] == [math.ceil(16 * 27 / 64), 100, 100, 100]


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


def test_a_search_without_training_has_nothing_to_choose_of_training(tmp_path: Path) -> None:
    front = ac.search("tests.mini:task", 8, epochs=0, run=tmp_path / "run", workers=1, quiet=True)
    assert (tmp_path / "run" / "config.yaml").read_text().count("epochs: 0") == 1
    chosen = {name for point in front.points for _, name, _ in Recipe.from_json(point.recipe)}
    assert not chosen & {"learning_rate", "rate_penalty", "precision"}
    again = ac.resume(tmp_path / "run", budget=10, workers=1, quiet=True)
    assert len(list((tmp_path / "run" / "trials").iterdir())) == 10
    assert len(again.points) >= len(front.points) - 1
