"""Any model: every architecture goes through a whole trial, from recipe to decoded file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import load, read_artifact
from autocompress.files import ARTIFACT
from autocompress.recipe import Choice
from autocompress.space import SearchSpace
from autocompress.task import Task, measure
from autocompress.trial.compression import Candidate
from autocompress.trial.workshop import TrialResult, TrialSpec, Workshop

SPACE = SearchSpace.parse(
    """
layers:
  "*":
    channels: [1.0, 0.5]
    sparsity: [0, 0.5]
    weights: [float32, int4]
    activation: [keep, hardtanh]
    activation_bits: [32, 8]
model: {vectors: [float32, e8m5]}
"""
)


def workshop_of(task: Task, folder: Path) -> Workshop:
    return Workshop(task, task.build(), SPACE, folder, 0)


def run(workshop: Workshop, number: int, chosen: dict[str, Choice], parent: int | None = None) -> TrialResult:
    recipe = workshop.space.recipe(chosen)
    result = [*workshop.run(TrialSpec(number, recipe.to_json(), parent))][-1]
    assert isinstance(result, TrialResult)
    return result


def test_heaviest_recipe_then_a_child_of_it(any_task: Task, tmp_path: Path) -> None:
    workshop = workshop_of(any_task, tmp_path)
    light = {d.key: d.choices[-1] for d in workshop.space if d.name not in ("channels", "activation")}
    heavy = {d.key: d.choices[-1] for d in workshop.space}
    for number, (chosen, parent) in enumerate([(light, None), (heavy, 0)]):
        result = run(workshop, number, chosen, parent)
        path = tmp_path / "trials" / str(number) / ARTIFACT
        assert result.size_bytes == path.stat().st_size
        decoded = load(path, any_task.build())
        assert measure(any_task, decoded, "val") == result.val_accuracy
        stored = workshop.space.recipe(chosen).only(("activation", "activation_bits"))
        assert read_artifact(path).recipe == stored
    if workshop.anatomy.groups:
        before = sum(p.numel() for p in workshop.original.parameters())
        assert sum(p.numel() for p in decoded.parameters()) < before


def test_the_lightest_recipe_is_the_model_itself(any_task: Task, tmp_path: Path) -> None:
    any_task.epochs = 0
    workshop = workshop_of(any_task, tmp_path)
    result = run(workshop, 0, {})
    assert result.val_accuracy == 1.0
    decoded = load(tmp_path / "trials" / "0" / ARTIFACT, any_task.build())
    (inputs, _) = next(any_task.batches("val"))
    with torch.no_grad():
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        torch.testing.assert_close(decoded(*args), workshop.original(*args), rtol=1e-4, atol=1e-4)


def test_profile_covers_every_choice(any_task: Task, tmp_path: Path) -> None:
    workshop = workshop_of(any_task, tmp_path)
    profile = workshop.base_profile()
    for dimension in workshop.space:
        assert set(profile["effects"][dimension.key]) == {str(c) for c in dimension.choices}
        assert min(profile["effects"][dimension.key].values()) >= 0


@pytest.mark.parametrize("dimension", ["channels", "sparsity", "weights", "vectors"])
def test_each_dimension_alone_makes_the_file_smaller(dimension: str, tmp_path: Path) -> None:
    from tests.conftest import zoo_task

    task = zoo_task("residual", epochs=0)
    workshop = workshop_of(task, tmp_path)
    whole = run(workshop, 0, {}).size_bytes
    chosen = {d.key: d.choices[-1] for d in workshop.space if d.name == dimension}
    assert run(workshop, 1, chosen).size_bytes < whole


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


class Viewing(nn.Module):
    """Calls `view` on what comes out of convolutions, as PyTorch's own tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = convolutions(), nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).view(len(x), -1))
        return out


def flat(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1) - target).square().mean()


def viewed(output: Tensor, target: Tensor) -> Tensor:
    return flat(output.view(len(output), -1), target)


@pytest.mark.parametrize("viewing", ["model", "loss", "metric", "nothing"])
def test_channels_are_last_in_memory_where_nothing_needs_them_otherwise(viewing: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Viewing() if viewing == "model" else convolutions()
    data = torch.randn(48, 1, 8, 8)
    batches = [(data, model(data).detach().flatten(1))]
    metric = viewed if viewing == "metric" else flat
    loss = viewed if viewing == "loss" else flat
    task = Task(model, batches, batches, batches, loss=loss, metric=lambda *both: -float(metric(*both)), epochs=2)
    workshop = workshop_of(task, tmp_path)
    weight = next(w for w in workshop.original.parameters() if w.shape == (4, 8, 3, 3))
    assert weight.is_contiguous() == (viewing != "nothing")
    run(workshop, 0, {d.key: d.choices[-1] for d in workshop.space})


class Projected(nn.Module):
    """A residual block with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 16, 3, 2, 1)
        self.shortcut, self.head = nn.Conv2d(24, 16, 1, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        out: Tensor = self.head((self.block(x) + self.shortcut(x)).relu().mean((2, 3)))
        return out


def test_narrow_shortcuts_do_not_end_the_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Projected().eval(), torch.randn(48, 1, 16, 16)
    batches = [(data, model(data).argmax(1))]
    workshop = workshop_of(Task(model, batches, batches, batches, epochs=8), tmp_path)
    assert not workshop.original.get_parameter("block.weight").is_contiguous()
    space = SearchSpace.parse("layers: {stem: {channels: [1.0, 0.3]}}").bind(workshop.anatomy)
    for number, share in enumerate((1.0, 0.3)):
        recipe = space.recipe({d.key: share for d in space})
        candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
        weight = candidate.model.get_parameter("block.weight")
        assert weight.shape[1] == (24, 7)[number]
        assert weight.is_contiguous() == bool(number), "channels are first where there are few"
        result = workshop.finish(number, recipe)
        assert 0 <= result.val_accuracy <= 1


class Mapped(nn.Module):
    """Gives its middle one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.vmap(self.middle)(self.stem(x)))
        return out


def test_what_runs_inside_vmap_keeps_its_activations(tmp_path: Path) -> None:
    batches = [(torch.randn(16, 8), torch.randint(4, (16,)))]
    workshop = workshop_of(Task(Mapped(), batches, batches, batches, epochs=1), tmp_path)
    assert workshop.anatomy.inputs == ("stem", "head")
    assert not workshop.anatomy.activations
    told = [site for site, reason in workshop.anatomy.left_alone.items() if "torch.vmap" in reason]
    assert told == ["middle.0", "middle.1"]
    run(workshop, 0, {d.key: d.choices[-1] for d in workshop.space})
