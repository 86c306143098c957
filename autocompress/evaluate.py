"""Size and accuracy of a file, measured afresh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autocompress.artifact import load
from autocompress.task import Task, load_task, measure


@dataclass(frozen=True)
class Evaluation:
    """size_bytes: of the file on disk. Accuracies: the task's metric of the decoded model."""

    size_bytes: int
    val_accuracy: float
    test_accuracy: float


def evaluate(path: str | Path, task: Task | str) -> Evaluation:
    """Decode a `.acz` file into a fresh model of the task and measure it on both held-out splits.

    Raises ArtifactError when the file cannot be read or does not fit the task's model.
    """
    given = load_task(task) if isinstance(task, str) else task
    model = load(path, given.build())
    return Evaluation(Path(path).stat().st_size, measure(given, model, "val"), measure(given, model, "test"))
