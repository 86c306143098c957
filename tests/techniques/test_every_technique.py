"""What each technique promises, whichever it is: read off the registry, so a new one is tested by being there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autocompress.artifact import load, pack, unpack
from autocompress.recipe import MODEL, Choice, Recipe
from autocompress.report.techniques import markdown, rows
from autocompress.space import SearchSpace, dimensions
from autocompress.task import Task, to_device
from autocompress.techniques import names
from autocompress.techniques.base import Technique, structures, techniques, trainings
from autocompress.trial.compression import Candidate
from autocompress.trial.rate import RateModel
from autocompress.trial.training import fine_tune
from autocompress.trial.workshop import TrialResult, TrialSpec, Workshop
from tests.conftest import DEVICES, small_digits, workshop_of, zoo_task

EVERY = [(technique, choice) for technique in techniques() for choice in technique.examples()]
IDS = [f"{technique.name}-{choice}" for technique, choice in EVERY]


def everywhere(technique: Technique, choice: Choice, task: Task, device: str = "cpu") -> tuple[Workshop, Recipe]:
    """A recipe that asks for this choice wherever it fits, beside something for it to act on."""
    workshop = workshop_of(task, device)
    chosen: dict[str, Choice] = {}
    for layer in workshop.anatomy.layers:
        chosen |= {f"{layer.name}:sparsity": 0.5, f"{layer.name}:weights": "int6"}
    chosen |= {f"{group.name}:channels": 0.75 for group in workshop.anatomy.groups}
    chosen |= {f"{name}:activation_bits": 8 for name in workshop.anatomy.inputs}
    for site in technique.sites(workshop.anatomy):
        if technique.fits(choice, site, workshop.anatomy):
            chosen[f"{site}:{technique.name}"] = choice
    return workshop, Recipe.of(chosen)


@pytest.mark.parametrize(("technique", "choice"), EVERY, ids=IDS)
def test_its_choices_are_what_a_space_can_name(technique: Technique, choice: Choice) -> None:
    offered = f'["{choice}"]' if isinstance(choice, str) else f"[{choice}]"
    section = "model" if technique.name in trainings() else "layers"
    text = f"{{{technique.name}: {offered}}}" if section == "model" else f'{{"*": {{{technique.name}: {offered}}}}}'
    space = SearchSpace.parse(f"{section}: {text}")
    named = space.training if section == "model" else dict(space.rules)["*"]
    assert named[technique.name] == (choice,)
    assert dimensions()[technique.name].default == technique.default


@pytest.mark.parametrize(("technique", "choice"), EVERY, ids=IDS)
@pytest.mark.parametrize("name", ["conv1d", "residual", "transformer"])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_trained_and_the_file_gives_back_what_it_made(
    technique: Technique, choice: Choice, name: str, device: str
) -> None:
    """Linear layers, convolutions of one and two dimensions, attention; bytes accounted within 3%."""
    if not technique.available(choice):
        pytest.skip("not on this machine")
    task = zoo_task(name)
    workshop, recipe = everywhere(technique, choice, task, device)
    candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
    for _ in fine_tune(task, candidate, workshop.original, 1):
        pass
    for shadow in candidate.layers.values():
        assert bool(shadow.dense.isfinite().all())
    rate = RateModel(candidate)
    rate.calibrate()
    data = pack(candidate.weights(), candidate.recipe)
    assert rate.bytes() == pytest.approx(len(data), rel=0.03)
    decoded = unpack(data, task.build())
    for shadow in candidate.layers.values():
        assert torch.equal(decoded.get_parameter(shadow.key), shadow.parameter.detach().cpu())
    batch = to_device(next(task.batches("val")), torch.device(device))
    with torch.no_grad():
        got, expected = task.run(decoded.to(device), batch)[0], task.run(candidate.model, batch)[0]
    assert got.shape == expected.shape


@pytest.mark.parametrize("technique", techniques(), ids=lambda technique: type(technique).__name__)
def test_its_default_changes_nothing(technique: Technique) -> None:
    task = zoo_task("residual")
    workshop, _ = everywhere(technique, technique.default, task)
    chosen = {f"{site}:{technique.name}": technique.default for site in technique.sites(workshop.anatomy)}
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(chosen), workshop.calibration)
    candidate.materialise()
    batch = next(task.batches("val"))
    with torch.no_grad():
        assert torch.equal(task.run(candidate.model, batch)[0], task.run(workshop.original, batch)[0])


@pytest.mark.parametrize("technique", techniques(), ids=lambda technique: type(technique).__name__)
def test_it_tells_where_it_cannot_apply(technique: Technique) -> None:
    told = [row for row in rows() if row.dimension == technique.name]
    assert told
    assert all(row.what and row.not_for and row.choices for row in told)


def test_every_file_is_in_the_table_and_the_table_in_the_docs() -> None:
    assert len({row.what for row in rows()}) == len(names())
    assert (Path(__file__).parents[2] / "docs" / "techniques.md").read_text() == markdown()


def test_a_trial_tells_activation_sparsity_and_what_a_step_costs(tmp_path: Path) -> None:
    task = small_digits(1)
    text = "{layers: {'*': {activation: [keep, fatrelu-0.8]}}, model: {precision: [bfloat16]}}"
    workshop = Workshop(task, task.build(), SearchSpace.parse(text), tmp_path, 0)
    recipe = Recipe.of({"2:activation": "fatrelu-0.8", f"{MODEL}:precision": "bfloat16"})
    *_, result = workshop.run(TrialSpec(0, recipe.to_json()))
    assert isinstance(result, TrialResult)
    assert set(result.activation_sparsity) == {"2", "4"}
    assert result.activation_sparsity["2"] > 0.6
    decoded = load(tmp_path / "trials/0/model.acz", task.build())
    seen: list[float] = []
    decoded[2].register_forward_hook(lambda m, a, out: seen.append(float((out == 0).float().mean())))
    workshop.calibration(decoded)
    assert result.activation_sparsity["2"] == pytest.approx(seen[0], abs=1e-6)
    assert set(result.step_costs) == {"float32", "bfloat16"}


def test_structure_comes_first_and_bits_of_activations_last() -> None:
    """Prune first, quantise second."""
    assert list(structures()) == ["structure", "channels", "activation", "activation_bits"]
