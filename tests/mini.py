"""Tasks that worker processes can import: real data, a model of a few thousand weights, and its bad days."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress import Task
from tests.conftest import small_digits


def task() -> Task:
    return small_digits(epochs=2)


def brief_task() -> Task:
    """Of one epoch, so that no trial is stopped halfway, whatever the order of two workers."""
    return small_digits(epochs=1)


def task_from_a_file() -> Task:
    """Its weights lie in the current folder, and are named from there."""
    given = task()
    model = given.build()
    model.load_state_dict(torch.load("weights.pt"))
    given.model = model
    return given


def slow_task() -> Task:
    """Half a second a trial, so that there is a middle to be killed in."""
    slow = small_digits(epochs=1)
    slow.loss = _slow_loss
    return slow


def _slow_loss(output: Tensor, target: Tensor) -> Tensor:
    time.sleep(0.06)
    return nn.functional.cross_entropy(output, target)


def moody_task() -> Task:
    """Some trials raise, some have a loss that is not a number; which ones follows from their seeds."""
    moody = small_digits(epochs=2)
    moody.loss = _moody_loss
    return moody


def _moody_loss(output: Tensor, target: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(output, target)
    if output.requires_grad:
        luck = float(torch.rand(()))
        if luck < 0.02:
            raise MemoryError("no room for this batch")
        if luck > 0.98:
            return loss * float("nan")
    return loss


def deadly_task() -> Task:
    """The first trial that trains takes its worker process with it, the second raises."""
    deadly = small_digits(epochs=1)
    deadly.loss = _deadly_loss
    return deadly


def _deadly_loss(output: Tensor, target: Tensor) -> Tensor:
    mark = Path(os.environ["DEADLY_MARK"])
    trained = len(mark.read_text()) if mark.exists() else 0
    if output.requires_grad and trained < 2:
        mark.write_text("x" * (trained + 1))
        if trained:
            raise MemoryError("no room for this batch")
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(output, target)


def hopeless_task() -> Task:
    """Checks pass, every trial fails."""
    hopeless = small_digits(epochs=1)
    hopeless.loss = _hopeless_loss
    return hopeless


def _hopeless_loss(output: Tensor, target: Tensor) -> Tensor:
    if output.requires_grad:
        raise ValueError("the moon is in the wrong house")
    return nn.functional.cross_entropy(output, target)
