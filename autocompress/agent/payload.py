"""What makes a worker's Workshop in another process."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
from torch import nn
from torch.utils.data import DataLoader

from autocompress.errors import TaskError, in_words
from autocompress.model.reparametrization import copied
from autocompress.space import BoundSpace
from autocompress.task import Task, fastest_device, load_task
from autocompress.trial.workshop import Workshop


@dataclass
class _Plan:
    """Pickled once. task: its name where it has one. epochs: of a trial. model: pickled by itself, so that each worker
    has its own."""

    task: Task | str
    epochs: int
    model: bytes
    space: BoundSpace
    folder: str
    seed: int

    def __call__(self) -> Workshop:
        task = load_task(self.task) if isinstance(self.task, str) else self.task
        model = cloudpickle.loads(self.model)
        return Workshop(
            replace(task, epochs=self.epochs), model, self.space, Path(self.folder), self.seed, fastest_device()
        )


def payload(task: Task, named: bool, original: nn.Module, space: BoundSpace, folder: Path, seed: int) -> bytes:
    """cloudpickle of a function that makes the Workshop. named: workers find the task by its name.

    Raises TaskError when the model or the task cannot be pickled.
    """
    own = copied(original).cpu()
    try:
        model = _pickled(own)
    except Exception as error:
        raise TaskError(
            f"the model of task {task.name!r} cannot be sent to workers ({in_words(error)}): pickle must be able to "
            "write it"
        ) from error
    sent: Task | str = task.name if named else task
    if isinstance(sent, Task) and isinstance(task.model, nn.Module):
        sent = replace(task, model=task.build())
    plan = _Plan(sent, task.epochs, model, space, str(folder.resolve()), seed)
    try:
        return _pickled(plan)
    except Exception as error:
        raise TaskError(
            f"task {task.name!r} cannot be sent to workers ({error}); name it as package.module:function instead"
        ) from error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # which has no types
    """Loaders whose own workers are running (`persistent_workers`) go without them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, DataLoader) and obj._iterator is not None:
            idle = copy.copy(obj)
            idle._iterator = None
            return idle.__reduce_ex__(2)
        return super().reducer_override(obj)


def _pickled(value: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()
