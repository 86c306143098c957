"""Which weights lie on a grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.space import BoundSpace, SearchSpace
from autocompress.task import Task
from autocompress.trial.grids import grid_of
from autocompress.trial.workshop import Workshop


def coloured() -> Tensor:
    """Three channels that are much alike."""
    return smooth(64, 1, 16, 16) + 0.4 * smooth(64, 3, 16, 16)


def smooth(*shape: int) -> Tensor:
    """Noise, averaged over squares of five."""
    torch.manual_seed(0)
    return nn.functional.avg_pool2d(torch.randn(*shape), 5, 1, 2)


SIGHTS: dict[str, tuple[Tensor, tuple[int, ...]]] = {
    "square": (smooth(64, 1, 28, 28), (28, 28)),
    "oblong": (smooth(64, 1, 9, 12), (9, 12)),
    "channels": (smooth(64, 3, 16, 16), (48, 16)),
    "colours": (coloured(), (48, 16)),
    "signal": (smooth(500, 1, 1, 40), (40,)),
    "shuffled": (smooth(64, 1, 28, 28)[..., torch.randperm(28), :][..., torch.randperm(28)], ()),
    "noise": (torch.randn(64, 100), ()),
    "constant": (torch.ones(64, 100), ()),
    "few": (torch.randn(64, 16).cumsum(1), ()),
    "loud": (torch.randn(64, 100) + 9 * torch.randn(64, 1), ()),
    "infinite": (torch.full((4, 100), torch.inf), ()),
    "one": (torch.randn(1, 100), ()),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_images_are_told_by_what_is_like_its_neighbours(sight: str) -> None:
    inputs, expected = SIGHTS[sight]
    assert grid_of(inputs.flatten(1)) == expected


def test_kernels_and_first_layers_have_one_and_spaces_name_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(576, 3))
    batch = smooth(64, 1, 12, 12), torch.zeros(64, dtype=torch.long)
    task = Task(model, [batch], [batch], [batch], epochs=1)
    workshop = Workshop(task, model, SearchSpace.named("default"), tmp_path, 0)
    assert {layer.name: layer.grid for layer in workshop.anatomy.layers}["0"] == (3, 3)
    assert {layer.name: layer.grid for layer in workshop.anatomy.layers}["2"] == ()
    assert [d.choices for d in workshop.space if d.key == "0:transform"] == [("dct",)]
    assert not [d for d in workshop.space if d.key == "2:transform"]


@pytest.mark.parametrize("how", ["as it is", "pruned", "quantised"])
def test_a_perceptron_that_reads_images(tmp_path: Path, how: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    weight = model.get_parameter("1.weight").data
    if how == "pruned":
        weight[torch.rand_like(weight) < 0.5] = 0
    if how == "quantised":
        weight.copy_((weight * 60).round() / 60)
    batch = smooth(64, 1, 12, 12), torch.zeros(64, dtype=torch.long)
    task = Task(model, [batch], [batch], [batch], epochs=1)
    anatomy = Workshop(task, model, BoundSpace(()), tmp_path, 0).anatomy
    assert [layer.grid for layer in anatomy.layers] == [(12, 12) if how == "as it is" else (), ()]


@pytest.mark.parametrize("shape", [(144,), (1, 144), (2, 3, 144)])
def test_inputs_of_any_shape_are_looked_at(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.long)
    task = Task(model, [batch], [batch], [batch], epochs=1, loss=lambda out, _: out.square().mean(), metric=closeness)
    assert [layer.grid for layer in Workshop(task, model, BoundSpace(()), tmp_path, 0).anatomy.layers] == [(), ()]


def closeness(output: Tensor, target: Tensor) -> float:
    return -float(output.square().mean())
