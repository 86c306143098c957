"""What is sent to workers: everything that a task of the user's own holds, or one sentence."""

from __future__ import annotations

import threading
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.agent.payload import payload
from autocompress.errors import TaskError
from autocompress.space import BoundSpace
from autocompress.task import Task
from autocompress.trial.workshop import Workshop


def test_a_loader_that_has_been_read_from_is_sent_without_its_own_workers(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    loader = DataLoader(data, 4, num_workers=1, persistent_workers=True)
    task = Task(nn.Linear(4, 2), loader, loader, loader)
    first = list(loader)
    sent = payload(task, False, task.build(), BoundSpace(()), tmp_path, 0)
    workshop: Workshop = cloudpickle.loads(sent)()
    again = list(workshop.task.batches("train"))
    assert [x.tolist() for x, _ in again] == [x.tolist() for x, _ in first]
    assert loader._iterator is not None, "the user's own goes on"


def test_what_cannot_be_sent_is_told(tmp_path: Path) -> None:
    lock = threading.Lock()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with lock:
            return output.sum()

    task = Task(nn.Linear(4, 2), [], [], [], loss=loss)
    with pytest.raises(TaskError, match=r"cannot be sent to workers .*name it as package\.module:function"):
        payload(task, False, nn.Linear(4, 2), BoundSpace(()), tmp_path, 0)
