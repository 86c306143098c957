"""What is exported is what the file decodes to, for batches of any length."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autocompress as ac
from autocompress.artifact import pack
from autocompress.errors import ArtifactError, ExportError
from autocompress.exporting import FORMATS as KINDS
from autocompress.recipe import Choice, Recipe
from autocompress.trial.compression import Candidate
from autocompress.trial.workshop import Workshop
from tests.conftest import small_digits, workshop_of, zoo_task

HAS_ONNX = all(importlib.util.find_spec(name) for name in KINDS[".onnx"].packages)
FORMATS = [".pt2", pytest.param(".onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="without autocompress[onnx]"))]


def some_of_everything(task: ac.Task) -> dict[str, Choice]:
    rng, space = random.Random(0), Workshop(task, task.build(), ac.SearchSpace.named("everything"), Path(), 0).space
    chosen = {d.key: rng.choice(d.choices) for d in space if d.key != "model:structure"}
    return space.recipe({d.key: d.default for d in space} | chosen).as_dict()


def file_of(task: ac.Task, folder: Path, choices: dict[str, Choice]) -> Path:
    """A file of the task's model, not fine-tuned, with these choices."""
    workshop = workshop_of(task)
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe.of(choices), workshop.calibration)
    candidate.set_masks()
    candidate.materialise()
    path = folder / "model.acz"
    path.write_bytes(pack(candidate.weights(), candidate.recipe))
    return path


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["residual", "transformer", "two_inputs"])
def test_it_is_as_good_as_the_decoded_model(name: str, suffix: str, tmp_path: Path) -> None:
    task = zoo_task(name)
    path = file_of(task, tmp_path, some_of_everything(task))
    made = ac.export(path, task, tmp_path / f"model{suffix}")
    assert made.size_bytes == made.path.stat().st_size
    decoded = ac.evaluate(path, task)
    assert (made.val_accuracy, made.test_accuracy) == (decoded.val_accuracy, decoded.test_accuracy)


@pytest.mark.parametrize("suffix", FORMATS)
def test_layers_that_round_one_input_in_two_ways(suffix: str, tmp_path: Path) -> None:
    """Which ONNX's optimiser makes a graph out of order of."""
    task, at = zoo_task("transformer"), "encoder.layers.1.self_attn"
    path = file_of(task, tmp_path, {f"{at}.q_proj:activation_bits": 4, f"{at}.v_proj:activation_bits": 6})
    made = ac.export(path, task, tmp_path / f"model{suffix}")
    assert made.val_accuracy == ac.evaluate(path, task).val_accuracy


def test_batches_may_be_of_any_length(tmp_path: Path) -> None:
    task = small_digits()
    path = file_of(task, tmp_path, {"1:weights": "int4", "1:sparsity": 0.5, "3:weights": "int8"})
    made = ac.export(path, task, tmp_path / "model.pt2")
    program = torch.export.load(made.path).module()
    model = ac.load(path, task.build())
    for count in (1, 2, 7, 500):
        images = torch.randn(count, 1, 8, 8)
        assert torch.allclose(program(images), model(images), atol=1e-6)


class Named(nn.Module):
    """Called by names, returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, left: Tensor, *, right: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(torch.cat([left, right], 1))}


@pytest.mark.parametrize("suffix", FORMATS)
def test_inputs_and_outputs_with_names(suffix: str, tmp_path: Path) -> None:
    batches = [({"left": torch.randn(n, 2), "right": torch.randn(n, 4)}, torch.randint(3, (n,))) for n in (8, 8, 5)]
    task = ac.Task(
        Named(),
        batches,
        batches,
        batches,
        loss=lambda output, target: nn.functional.cross_entropy(output["scores"], target),
        metric=lambda output, target: float((output["scores"].argmax(1) == target).float().mean()),
    )
    path = file_of(task, tmp_path, {"head:weights": "int8"})
    made = ac.export(path, task, tmp_path / f"model{suffix}")
    assert made.test_accuracy == ac.evaluate(path, task).test_accuracy


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x)
        return scores if float(scores.detach().sum()) > 0 else -scores


def test_what_cannot_be_exported_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    task = ac.Task(Stubborn(), batches, batches, batches)
    path = file_of(task, tmp_path, {})
    with pytest.raises(ExportError, match=r"cannot be exported to \.pt2: .+") as told:
        ac.export(path, task, tmp_path / "model.pt2")
    assert "\n" not in str(told.value)
    around = replace(task, forward=lambda model, batch: (model.head(batch[0]), batch[1]), name="around")
    with pytest.raises(ExportError, match=r"task 'around' does not call its model as model\(\.\.\.\)"):
        ac.export(path, around, tmp_path / "model.pt2")
    with pytest.raises(ExportError, match=r"ends with \.pt2 or \.onnx"):
        ac.export(path, task, tmp_path / "model.tflite")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install onnx onnxscript onnxruntime"):
        ac.export(path, task, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"nothing\.acz"):
        ac.export(tmp_path / "nothing.acz", task, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.acz"]
