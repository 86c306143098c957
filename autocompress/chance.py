"""What a model that knows nothing would score: the mean output, whatever the input.

Accuracies and losses of any scale become comparable by it, as in the skill scores of forecasts (Murphy, 1988): nothing
here or above takes a metric for a share of right answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.divergence import class_dimension
from autocompress.task import Calibration, batch_size, is_batched, leaves, map_leaves, measure


@torch.no_grad()
def chance_accuracy(calibration: Calibration, model: nn.Module) -> float:
    """On the validation split, of the mean output of `model` on the first calibration batch; 0 where the metric, or a
    model whose outputs are no tensors of one shape, does not allow it."""
    task, uninformed = calibration.task, _uninformed(calibration, model)

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        output, target = task.run(model, batch)
        return uninformed(output, batch_size(batch)), target

    try:
        return measure(replace(task, forward=forward), model, "val")
    except Exception:  # whatever a user's own metric makes of such outputs
        return 0.0


@torch.no_grad()
def loss_unit(calibration: Calibration, model: nn.Module) -> float:
    """What losses are divided by, so that the price of bits and the distance to the original are worth as much beside
    any: 1 of class scores, whose losses are in nats, else the loss of the mean output."""
    output, target = calibration.run(model)
    if any(isinstance(leaf, Tensor) and class_dimension(leaf, target) is not None for leaf in leaves(output)):
        return 1.0
    uninformed = _uninformed(calibration, model)(output, batch_size(calibration.batches[0]))
    try:
        own, chance = (float(calibration.task.loss(out, target)) for out in (output, uninformed))
    except Exception:  # whatever a user's own loss makes of such outputs
        return 1.0
    return chance if 0 < chance < math.inf and chance != own else 1.0


def _uninformed(calibration: Calibration, model: nn.Module) -> Callable[[Any, int], Any]:
    """(output, samples in it) -> what it would be if it were always the mean."""

    def mean(leaf: Any, size: int) -> Tensor | None:
        return leaf.mean(0) if is_batched(leaf, size) and leaf.is_floating_point() else None

    means = [mean(leaf, batch_size(calibration.batches[0])) for leaf in leaves(calibration(model))]

    def change(output: Any, size: int) -> Any:
        left = iter(means)

        def constant(leaf: Any) -> Any:
            known = next(left, None)
            fits = known is not None and is_batched(leaf, size) and leaf.shape[1:] == known.shape
            return known.expand_as(leaf) if known is not None and fits else leaf

        return map_leaves(output, constant)

    return change
