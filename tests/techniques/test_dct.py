"""Transform coding: the coefficients are pruned, quantised and stored; the model sees plain weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch import nn

from autocompress.artifact import load, pack, read_artifact, unpack
from autocompress.artifact.basis import Basis
from autocompress.artifact.container import decode_artifact
from autocompress.recipe import Recipe
from autocompress.report.inside import parts
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.techniques.base import transforms
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune
from autocompress.trial.workshop import Workshop
from tests.conftest import workshop_of, zoo_task

DCT = transforms()["dct"]


@pytest.mark.parametrize("kernel", [(3, 3), (5,), (7, 1), (2, 4, 6)])
def test_kernels_are_transformed_whole(kernel: tuple[int, ...]) -> None:
    """Independent reference: scipy."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4, *kernel)
    expected = dctn(weight.double().numpy(), axes=range(2, weight.ndim), norm="ortho")
    assert torch.allclose(Basis(DCT).analysed(weight), torch.from_numpy(expected).float(), atol=1e-6)


def test_images_are_transformed_in_blocks_and_low_frequencies_come_first() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 8 * 12)
    blocks = weight.double().view(5, 2, 4, 3, 4).numpy()
    expected = torch.from_numpy(dctn(blocks, axes=(2, 4), norm="ortho")).permute(0, 2, 1, 4, 3).reshape(5, 96)
    assert torch.allclose(Basis(DCT, 12).analysed(weight), expected.float(), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 140), st.integers(0, 9))
def test_it_is_orthonormal_and_comes_back(rows: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, basis = torch.randn(rows, height * width), Basis(DCT, width)
    coefficients = basis.analysed(weight)
    assert float(coefficients.norm()) == pytest.approx(float(weight.norm()), rel=1e-5)
    assert torch.allclose(basis.synthesised(coefficients), weight, atol=1e-5)
    differentiable = coefficients.clone().requires_grad_()
    back = basis.synthesised(differentiable)
    assert torch.allclose(back, weight, atol=1e-5)
    gradient = torch.randn_like(weight)
    torch.autograd.backward(back, gradient)
    assert differentiable.grad is not None
    assert torch.allclose(differentiable.grad, basis.analysed(gradient), atol=1e-5)


def test_coefficients_are_sparse_and_of_few_values_and_weights_are_not() -> None:
    task = zoo_task("residual")
    workshop = workshop_of(task)
    recipe = {"conv1:transform": "dct", "conv1:sparsity": 0.7, "conv1:weights": "int4"}
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(recipe), workshop.calibration)
    for _ in fine_tune(task, candidate, workshop.original, 1):
        pass
    artifact = decode_artifact(pack(candidate.weights(), candidate.recipe))
    stored = artifact.tensors["conv1.weight"]
    assert stored.coefficients is not None
    assert (stored.coefficients == 0).float().mean() >= 0.69
    assert len(stored.coefficients.unique()) <= 16
    assert len(stored.value.unique()) > 16
    (part,) = [part for part in parts(artifact) if part.name == "conv1"]
    assert part.zeros >= 0.69
    assert part.also == "transform dct"
    decoded = unpack(artifact, task.build())
    assert type(decoded.get_submodule("conv1")) is nn.Conv2d
    assert torch.equal(decoded.get_parameter("conv1.weight"), candidate.model.get_parameter("conv1.weight"))


def test_what_is_read_is_the_same_everywhere_and_as_trained() -> None:
    """Exact sums: the order in which a machine adds does not matter, and nothing is left of what cancels out."""
    torch.manual_seed(0)
    coefficients, basis = (torch.randn(9, 4 * 70) * (torch.rand(9, 280) < 0.3)), Basis(DCT, 70)
    read = basis.read(coefficients)
    assert torch.allclose(read, basis.synthesised(coefficients), atol=1e-5)
    whole = (coefficients * 2**20).round()
    assert torch.equal(basis.read(whole * 2**-20).double() * 2**20, basis.read(whole).double())
    twin = torch.zeros(1, 16)
    twin[0, 1], twin[0, 4] = 1.0, -1.0
    assert int((Basis(DCT, 4).read(twin) == 0).sum()) == 4  # the diagonal
    assert torch.equal(Basis(DCT, 4).read(twin * 0), twin * 0)


def test_without_pruning_and_rounding_nothing_changes() -> None:
    workshop = workshop_of(zoo_task("conv1d"))
    chosen = {"0:transform": "dct", "4:transform": "dct"}
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(chosen), workshop.calibration)
    candidate.materialise()
    for key, parameter in candidate.model.named_parameters():
        assert torch.allclose(parameter, workshop.original.get_parameter(key), atol=1e-6)


@pytest.mark.parametrize("before", ["none", "dct"])
def test_a_child_goes_on_from_the_weights_of_its_parent(before: str) -> None:
    task = zoo_task("residual")
    workshop = workshop_of(task)
    parent_recipe = Recipe.of({"conv1:transform": before, "stem.0:channels": 0.75})
    parent = Candidate(workshop.original, workshop.anatomy, parent_recipe, workshop.calibration)
    for _ in fine_tune(task, parent, workshop.original, 1):
        pass
    parent.materialise()
    recipe = Recipe.of({"conv1:transform": "dct", "stem.0:channels": 0.75})
    child = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration, parent.state(), parent_recipe)
    child.materialise()
    for key, parameter in child.model.named_parameters():
        assert torch.allclose(parameter, parent.model.get_parameter(key), atol=1e-5)


def smooth_perceptron() -> Task:
    """Reads images whose labels are in their coarse structure."""
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(512, 1, 12, 12), 5, 1, 2)
    labels = (images[:, 0, :6].mean((1, 2)) > images[:, 0, 6:].mean((1, 2))).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    batches = [(images[i : i + 128], labels[i : i + 128]) for i in range(0, 512, 128)]
    return Task(model, batches[:3], batches[3:], batches[3:], epochs=2, name="smooth")


def test_trials_of_a_space_that_offers_it_and_bytes_foreseen(tmp_path: Path) -> None:
    """The profile measures in the basis that is given, in each where there is a choice; a parent may have another."""
    task = smooth_perceptron()
    text = "layers: {{'*': {{transform: [{}], sparsity: [0, 0.8, 0.9], weights: [float32, int4]}}}}"
    profiles = []
    for offered in ("none", "dct", "none, dct"):
        workshop = Workshop(task, task.build(), SearchSpace.parse(text.format(offered)), tmp_path / offered, 0)
        profiles.append(workshop.base_profile()["layer_bytes"]["1"])
    none, dct, both = profiles
    assert both == {f"{key}|none": size for key, size in none.items()} | dct
    first = workshop.finish(0, Recipe.of({"1:sparsity": 0.8, "1:weights": "int4"}))
    recipe = Recipe.of({"1:sparsity": 0.8, "1:weights": "int4", "1:transform": "dct"})
    second = workshop.finish(1, recipe, parent=0)
    assert second.estimated_bytes == pytest.approx(second.size_bytes, rel=0.05)
    assert min(first.val_accuracy, second.val_accuracy) > 0.8
    stored = read_artifact(workshop.trial_folder(1) / "model.acz").tensors["1.weight"]
    assert stored.basis == Basis(DCT, 12)


def test_without_training_layers_are_fitted_in_their_basis(tmp_path: Path) -> None:
    """Nothing to choose: the same weights in any basis. Pruned: nearer to the original than without a fit."""
    task = smooth_perceptron()
    task.epochs = 0
    workshop = Workshop(task, task.build(), SearchSpace.named("default"), tmp_path, 0)
    assert [d.choices for d in workshop.space if d.key == "1:transform"] == [("dct",)]
    weights = []
    for number, transform in enumerate(("none", "dct")):
        workshop.finish(number, Recipe.of({"1:transform": transform, "3:sparsity": 0.5}))
        weights.append(load(workshop.trial_folder(number) / "model.acz", task.build()).get_parameter("1.weight"))
    assert torch.allclose(weights[0], weights[1], atol=1e-4)
    distances = []
    for number, fit in ((2, True), (3, False)):
        with nullcontext() if fit else mock.patch("autocompress.trial.workshop.reconstruct"):
            workshop.finish(number, Recipe.of({"1:transform": "dct", "1:sparsity": 0.9}))
        stored = read_artifact(workshop.trial_folder(number) / "model.acz").tensors["1.weight"].coefficients
        assert stored is not None
        assert (stored == 0).float().mean() >= 0.89
        decoded = load(workshop.trial_folder(number) / "model.acz", task.build())
        distances.append(workshop.prober.distance(decoded))
    assert distances[0] < 0.7 * distances[1]
