"""Metrics: of batches, whose mean is taken, or of a whole split, as F1 and AUC are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from autocompress.errors import TaskError
from autocompress.nested import leaves, map_leaves


@runtime_checkable
class SplitMetric(Protocol):
    """A metric of a whole split: what torchmetrics and torcheval have, or `WholeSplit` of a function."""

    def reset(self) -> Any:
        """Forget all batches."""

    def update(self, output: Any, target: Any, /) -> Any:
        """Take note of one batch."""

    def compute(self) -> Any:
        """One number, higher is better, of all batches since `reset`."""


Metric = Callable[[Any, Any], float] | SplitMetric


class WholeSplit:
    """A function of the outputs and targets of a whole split, where the mean over batches is something else: F1, AUC,
    R2. `metric(outputs, targets) -> float` is given what the batches gave, joined along the first dimension and on the
    CPU; of what is no tensor, a list.
    """

    def __init__(self, metric: Callable[[Any, Any], float]) -> None:
        self.metric = metric
        self.reset()

    def reset(self) -> None:
        self._outputs: list[Any] = []
        self._targets: list[Any] = []

    def update(self, output: Any, target: Any, /) -> None:
        for kept, value in ((self._outputs, output), (self._targets, target)):
            kept.append(map_leaves(value, lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf))

    def compute(self) -> float:
        return self.metric(_joined(self._outputs), _joined(self._targets))


def _joined(parts: list[Any]) -> Any:
    joined = map(_join, zip(*map(leaves, parts), strict=True))
    return map_leaves(parts[0], lambda leaf: next(joined))


def _join(values: tuple[Any, ...]) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        return list(values)
    return torch.cat(values) if values[0].ndim else torch.stack(values)


def score(metric: Metric, judged: Iterable[tuple[Any, Any, int]]) -> float:
    """The metric of batches of (output, target, samples).

    Raises TaskError when it gives something else than one number.
    """
    if isinstance(metric, SplitMetric):
        metric.reset()
        for output, target, _ in judged:
            metric.update(output, target)
        return _number(metric.compute())
    total, count = 0.0, 0
    for output, target, size in judged:
        total += size * _number(metric(output, target))
        count += size
    return total / count


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        kind = f"{tuple(value.shape)} numbers" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TaskError(f"the metric must give one number, higher for better models; it gave {kind}") from None
