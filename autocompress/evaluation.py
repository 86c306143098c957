"""Size and accuracy of a file, measured afresh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from autocompress.allocator import keep_freed_memory
from autocompress.artifact import load
from autocompress.model.anatomy import read_anatomy
from autocompress.task import Task, fastest_device, load_task, measure
from autocompress.trial.compression import activation_modules
from autocompress.trial.probing import zero_shares
from autocompress.trial.workshop import calibration_batches


@dataclass(frozen=True)
class Evaluation:
    """size_bytes: of the file on disk. Accuracies: the task's metric of the decoded model.
    activation_sparsity: activation -> share of zeros in its output, on the first training batches."""

    size_bytes: int
    val_accuracy: float
    test_accuracy: float
    activation_sparsity: dict[str, float]


def evaluate(path: str | Path, task: Task | str) -> Evaluation:
    """Decode a `.acz` file into a fresh model of the task and measure it on both held-out splits.

    Raises ArtifactError when the file cannot be read or does not fit the task's model.
    """
    keep_freed_memory()
    given = load_task(task) if isinstance(task, str) else task
    device = torch.device(fastest_device())
    model = load(path, given.build()).to(device)
    calibration = calibration_batches(given, device)
    activations = activation_modules(model, read_anatomy(given.build().to(device), calibration))
    return Evaluation(
        Path(path).stat().st_size,
        measure(given, model, "val"),
        measure(given, model, "test"),
        zero_shares(activations, lambda: calibration(model)),
    )
