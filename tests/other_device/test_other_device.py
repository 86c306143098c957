"""Trials on a device that is not the CPU, where there is no GPU. Takes a minute to compile: `pytest -m slow`."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

import autocompress as ac
from autocompress import evaluation
from autocompress.space import SearchSpace
from autocompress.trial.workshop import Workshop
from tests.conftest import ZOO, small_digits, zoo_task
from tests.other_device import DEVICE, register

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    os.environ["MAX_JOBS"] = "1"
    register()


def test_what_mixes_devices_fails() -> None:
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    assert torch.equal((there + there).cpu(), here + here)
    with pytest.raises(RuntimeError, match="two devices"):
        there + here
    with pytest.raises(RuntimeError, match="two devices"):
        torch.lerp(there, here, 0.5)
    with pytest.raises(TypeError, match="to host memory first"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


@pytest.mark.parametrize("epochs", [1, 0])
@pytest.mark.parametrize("space", ["default", "everything"])
@pytest.mark.parametrize("name", [*ZOO, "digits"])
def test_trials(name: str, space: str, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, rng = small_digits(epochs) if name == "digits" else zoo_task(name, epochs), random.Random(0)
    workshop = Workshop(task, task.build(), SearchSpace.named(space), tmp_path, 0, DEVICE)
    workshop.base_profile()
    for number, share in enumerate((0.05, 0.3, 0.6)):
        chosen = {d.key: rng.choice(d.choices) for d in workshop.space if rng.random() < share}
        recipe = workshop.space.recipe(chosen)
        result = workshop.finish(number, recipe)
        child = workshop.finish(10 + number, recipe, number)
        assert child.size_bytes == pytest.approx(result.size_bytes, rel=0.5)
    monkeypatch.setattr(evaluation, "fastest_device", lambda: DEVICE)
    assert ac.evaluate(tmp_path / "trials" / "2" / "model.acz", task).val_accuracy == pytest.approx(
        result.val_accuracy, abs=1e-6
    )
