"""Every way to store weights, inside every architecture: fine-tuned, written, read back to the bit."""

from __future__ import annotations

import pytest
import torch

from autocompress.artifact import pack
from autocompress.artifact.container import decode_artifact
from autocompress.model.surgery import as_real
from autocompress.recipe import Choice, Recipe
from autocompress.task import Task
from autocompress.trial.compression import Candidate
from autocompress.trial.rate import RateModel
from autocompress.trial.training import fine_tune
from tests.conftest import workshop_of

CODINGS: list[Choice] = ["float8-e4m3", "int4", "int4-channel", "ternary", "binary", "codebook-8"]
SPARSITIES: list[Choice] = [0.5, "2:4", "threshold-0.5"]


def candidate_of(task: Task, choices: dict[str, Choice]) -> Candidate:
    """Every layer with the same choices, as dimension -> choice."""
    workshop = workshop_of(task)
    named = {f"{layer.name}:{name}": choice for layer in workshop.anatomy.layers for name, choice in choices.items()}
    return Candidate(workshop.original, workshop.anatomy, Recipe.of(named), workshop.calibration)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_coding_in_a_model(coding: Choice, any_task: Task) -> None:
    candidate = candidate_of(any_task, {"weights": coding, "sparsity": 0.3})
    for _ in fine_tune(any_task, candidate, any_task.build(), 1):
        pass
    rate = RateModel(candidate)
    rate.calibrate()
    data = pack(candidate.weights(), candidate.recipe)
    assert rate.bytes() == pytest.approx(len(data), rel=0.03)
    stored = decode_artifact(data).tensors
    for shadow in candidate.layers.values():
        assert torch.equal(stored[shadow.key].value, as_real(shadow.parameter.detach()))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_mask_in_a_model(sparsity: Choice, any_task: Task) -> None:
    candidate = candidate_of(any_task, {"sparsity": sparsity})
    for _ in fine_tune(any_task, candidate, any_task.build(), 1):
        pass
    for shadow in candidate.layers.values():
        assert shadow.mask is not None
        weight = as_real(shadow.parameter.detach())
        assert bool((weight[shadow.mask == 0] == 0).all())
        if sparsity == "2:4":
            rows = weight.flatten(1)
            whole = rows[:, : rows.shape[1] // 4 * 4].reshape(-1, 4)
            assert int(whole.count_nonzero(1).max()) <= 2


@pytest.mark.parametrize("coding", CODINGS)
def test_a_child_goes_on_from_its_parent(coding: Choice, any_task: Task) -> None:
    """With fewer channels a step for each channel no longer fits; with the same it is inherited."""
    parent = candidate_of(any_task, {"weights": coding})
    state = parent.state()
    groups = {f"{group.name}:channels": 0.5 for group in parent.anatomy.groups}
    for more in ({}, groups):
        recipe = Recipe.of({**parent.recipe.as_dict(), **more})
        child = Candidate(any_task.build(), parent.anatomy, recipe, parent.run, state)
        child.materialise()
        pack(child.weights(), recipe)
        if not more:
            for name, shadow in child.layers.items():
                assert torch.equal(shadow.effective(), parent.layers[name].effective())
