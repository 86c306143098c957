"""What batch norms know of the model as fine-tuning has left it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.artifact import load
from autocompress.files import ARTIFACT, CHECKPOINT
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.trial.batch_norms import re_estimate
from autocompress.trial.workshop import Workshop


class Normed(nn.Module):
    """A norm that learns, one that is frozen and one that the forward pass does without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.learning, self.frozen, self.unused = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        for norm in (self.learning, self.frozen, self.unused):
            nn.init.uniform_(norm.running_mean)

    def train(self, mode: bool = True) -> Normed:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.frozen(self.learning(self.linear(x)).relu())))


def task() -> Task:
    torch.manual_seed(0)
    batches = [(torch.randn(32, 6), torch.randint(0, 3, (32,))) for _ in range(5)]
    return Task(Normed(), batches, batches, batches, epochs=2)


def statistics(given: Task, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean over the batches of mean and variance of what the learning norm is given."""
    parts = [torch.var_mean(model.linear(inputs), 0) for inputs, _ in given.batches("train")]
    variance, mean = (torch.stack(part).mean(0) for part in zip(*parts, strict=True))
    return mean, variance


def test_a_trial_of_a_few_steps_ends_with_the_statistics_of_the_weights_that_the_file_holds(tmp_path: Path) -> None:
    given = task()
    workshop = Workshop.on(given, SearchSpace.named("default"), tmp_path)
    chosen = {d.key: "int4" if d.name == "weights" else d.default for d in workshop.space}
    workshop.finish(0, workshop.space.recipe(chosen))
    state = load_file(tmp_path / "trials" / "0" / CHECKPOINT)
    model = load(tmp_path / "trials" / "0" / ARTIFACT, given.build())
    mean, variance = statistics(given, model)
    torch.testing.assert_close(state["learning.running_mean"], mean.detach())
    torch.testing.assert_close(state["learning.running_var"], variance.detach())


def test_what_is_frozen_or_not_used_keeps_its_own() -> None:
    given = task()
    model = given.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    re_estimate(given, model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert model.learning.momentum == 0.1
    assert changed == {f"learning.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert not any(module.training for module in model.modules())


def test_a_model_without_batch_norms_is_not_run() -> None:
    def unread() -> list[tuple[Tensor, Tensor]]:
        raise AssertionError("no batch is needed")

    re_estimate(Task(nn.Linear(2, 2), unread, unread, unread), nn.Linear(2, 2))
