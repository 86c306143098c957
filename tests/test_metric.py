"""Metrics of batches and of whole splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn

import autocompress as ac
from autocompress.errors import TaskError
from autocompress.metric import Metric
from autocompress.task import Task, check_task, measure
from tests.conftest import small_digits


def scored(metric: Metric, samples: int = 60, batch: int = 7) -> tuple[float, Tensor, Tensor]:
    """(what is measured of scores in batches, all scores, all labels): a few of the batches hold one class alone."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(samples, 2, generator=generator)
    labels = (scores[:, 1] + torch.randn(samples, generator=generator) > 1).long()
    labels[:batch] = 0
    batches = [*zip(scores.split(batch), labels.split(batch), strict=True)]
    identity = nn.Linear(2, 2, bias=False)
    nn.init.eye_(identity.weight)
    task = Task(identity, batches, batches, batches, metric=metric)
    check_task(task, task.build())
    return measure(task, task.build(), "val"), scores, labels


def f1(output: Tensor, target: Tensor) -> float:
    return float(f1_score(target, output.argmax(1), zero_division=0))


def auc(output: Tensor, target: Tensor) -> float:
    return float(roc_auc_score(target, output[:, 1]))


@pytest.mark.parametrize("function", [f1, auc])
def test_a_metric_of_the_whole_split_is_that_of_all_samples(function: Callable[[Tensor, Tensor], float]) -> None:
    measured, scores, labels = scored(ac.WholeSplit(function))
    assert measured == pytest.approx(function(scores, labels), abs=1e-9)


def test_the_mean_over_batches_is_another() -> None:
    measured, scores, labels = scored(f1)
    assert abs(measured - f1(scores, labels)) > 0.01


class Moving:
    """As torchmetrics and torcheval have them: with states, and a device."""

    def __init__(self) -> None:
        self.device = torch.device("meta")
        self.reset()

    def to(self, device: torch.device) -> Moving:
        self.device = device
        return self

    def reset(self) -> None:
        self.right, self.count = 0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        assert output.device == self.device
        self.right += int((output.argmax(1) == target).sum())
        self.count += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.right / self.count)


def test_a_metric_with_states_is_moved_and_forgets_other_splits() -> None:
    metric = Moving()
    first, scores, labels = scored(metric)
    assert first == pytest.approx(float((scores.argmax(1) == labels).float().mean()))
    assert scored(metric)[0] == first


def test_outputs_of_any_form_are_joined() -> None:
    def metric(outputs: Any, targets: Any) -> float:
        assert outputs["boxes"].shape == (6, 4)
        assert outputs["loss"].shape == (2,)
        assert outputs["names"] == ["a", "a"]
        return len(targets)

    whole = ac.WholeSplit(metric)
    for count in (2, 4):
        whole.update({"boxes": torch.ones(count, 4), "loss": torch.tensor(1.0), "names": "a"}, torch.zeros(count))
    assert whole.compute() == 6


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda output, target: output[0], r"must give one number.* gave \(2,\) numbers"),
        (lambda output, target: {"map": 0.5}, "must give one number.* gave a dict"),
        (ac.WholeSplit(lambda output, target: target), r"must give one number.* gave \(60,\) numbers"),
        (ac.WholeSplit(lambda output, target: 1 / 0), "measuring on the val split failed: ZeroDivisionError"),
        (ac.WholeSplit(lambda output, target: math.nan), "the metric on the val split is nan"),
    ],
)
def test_a_metric_that_gives_no_number_is_refused(metric: Metric, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        scored(metric)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_ray")
def test_a_search_with_a_metric_of_the_whole_split(in_tmp: Path) -> None:
    def macro(output: Tensor, target: Tensor) -> float:
        return float(f1_score(target, output.argmax(1), average="macro", zero_division=0))

    task = small_digits()
    task.metric = ac.WholeSplit(macro)
    front = ac.search(task, budget=2, workers=1, quiet=True)
    best = front[-1]
    model = ac.load(best.path, task.build()).eval()
    outputs = [task.run(model, batch) for batch in task.batches("test")]
    expected = macro(torch.cat([o for o, _ in outputs]), torch.cat([t for _, t in outputs]))
    assert best.test_accuracy == pytest.approx(expected, abs=1e-9)
