"""On a GPU, where there is one: float16 with a scaled loss, trials and their files, a search's workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autocompress as ac
from autocompress.artifact import load
from autocompress.recipe import MODEL, Choice, Recipe
from autocompress.space import SearchSpace
from autocompress.task import measure
from autocompress.trial.compression import Candidate
from autocompress.trial.training import fine_tune
from autocompress.trial.workshop import TrialResult, TrialSpec, Workshop
from tests.conftest import small_digits, workshop_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SPACE = """
layers: {"*": {channels: [1.0, 0.7, 0.5], sparsity: [0, 0.5, 0.8], weights: [float8-e4m3, int4, int2]}}
model: {vectors: [float32, e8m3], precision: [float32, bfloat16, float16], rate_penalty: [0.25]}
"""


SMALLER: dict[str, Choice] = {"channels": 0.7, "sparsity": 0.5, "weights": "int4"}


def half_compressed(precision: str) -> dict[str, Choice]:
    layers: dict[str, Choice] = {f"{layer}:{name}": c for layer in "13" for name, c in SMALLER.items()}
    return layers | {f"{MODEL}:precision": precision}


def on_the_gpu(output: Tensor, target: Tensor) -> Tensor:
    assert output.is_cuda
    assert target.is_cuda
    return nn.functional.cross_entropy(output, target)


def test_float16_with_a_scaled_loss_trains_as_well_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    scaled = torch.amp.GradScaler.scale

    def note(self: torch.amp.GradScaler, loss: Tensor) -> Tensor:
        scales.append(self.get_scale())
        out: Tensor = scaled(self, loss)
        return out

    monkeypatch.setattr(torch.amp.GradScaler, "scale", note)
    task, found = small_digits(8), {}
    for precision in ("float32", "bfloat16", "float16"):
        workshop, scales[:] = workshop_of(task, "cuda"), []
        recipe = Recipe.of(half_compressed(precision))
        candidate = Candidate(workshop.original, workshop.anatomy, recipe, workshop.calibration)
        for _ in fine_tune(task, candidate, workshop.original, 8):
            pass
        assert (max(scales) > 1) == (precision == "float16")
        assert all(shadow.dense.dtype == torch.float32 for shadow in candidate.layers.values())
        found[precision] = measure(task, candidate.model, "val")
    assert min(found.values()) > found["float32"] - 0.03


@pytest.mark.parametrize("epochs", [2, 0])
def test_a_trial_and_its_child_leave_files_that_any_machine_reads(epochs: int, tmp_path: Path) -> None:
    task = replace(small_digits(epochs), loss=on_the_gpu)
    workshop = Workshop(task, task.build(), SearchSpace.parse(SPACE), tmp_path, 0, "cuda")
    for number, precision in enumerate(("float32", "float16")):
        parent = number - 1 if number else None
        *_, result = workshop.run(TrialSpec(number, Recipe.of(half_compressed(precision)).to_json(), parent))
        assert isinstance(result, TrialResult)
        path = tmp_path / "trials" / str(number) / "model.acz"
        assert path.stat().st_size == result.size_bytes
        assert result.estimated_bytes == pytest.approx(result.size_bytes, rel=0.03)
        decoded = load(path, task.build())
        assert measure(task, decoded, "val") == pytest.approx(result.val_accuracy, abs=0.005)
        assert set(result.step_costs) == ({"float32", "float16"} if number else set())


def test_the_workers_of_a_search_use_it(tmp_path: Path) -> None:
    task = replace(small_digits(1), loss=on_the_gpu)
    front = ac.search(task, 6, run=tmp_path / "run", space=SearchSpace.parse(SPACE), workers=2, seed=0)
    assert len(list((tmp_path / "run" / "trials").glob("*/metrics.json"))) == 6
    for point in front:
        assert point.path.stat().st_size == point.size_bytes
