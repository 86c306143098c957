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
from autocompress.nested import leaves, map_leaves
from autocompress.task import Calibration, batch_size, is_batched, measure

_ABOUT = 2.0
"""Losses of class scores that are within this factor of nats stay as they are: smoothed, weighted, of two heads."""


@torch.no_grad()
def chance_accuracy(calibration: Calibration, model: nn.Module) -> float:
    """On the validation split, of the mean output of `model` on the first calibration batch; 0 where the metric, or a
    model whose outputs are no tensors of one shape, does not allow it."""
    task, constant = calibration.task, _constant_prediction(calibration, calibration(model))

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        output, target = task.run(model, batch)
        return constant(output, batch_size(batch)), target

    try:
        return measure(replace(task, forward=forward), model, "val")
    except Exception:  # whatever a user's own metric makes of such outputs
        return 0.0


@torch.no_grad()
def loss_unit(calibration: Calibration, model: nn.Module) -> float:
    """What losses are divided by, so that the price of bits and the distance to the original are worth as much beside
    any. Of class scores, what they make of a nat, or 1 where that is about a nat; else the loss of the mean output, or
    of the model where it has none."""
    output, target = calibration.run(model)
    classes = _classes(output, target)
    if classes:
        ignorant = map_leaves(output, lambda leaf: _undecided(leaf, target))
    else:
        ignorant = _constant_prediction(calibration, output)(output, batch_size(calibration.batches[0]))
    try:
        own, chance = (float(calibration.task.loss(out, target)) for out in (output, ignorant))
    except Exception:  # whatever a user's own loss makes of such outputs
        return 1.0
    unit = own if chance == own else chance  # it gives its loss itself, maybe
    if classes:
        unit = chance / math.log(classes)
        if chance == own or 1 / _ABOUT < unit < _ABOUT:
            return 1.0
    return unit if 0 < unit < math.inf else 1.0


def _classes(output: Any, target: Any) -> int:
    """How many classes there are scores of; 0 of outputs without."""
    for leaf in leaves(output):
        if isinstance(leaf, Tensor) and (dimension := class_dimension(leaf, target)) is not None:
            return leaf.shape[dimension]
    return 0


def _undecided(leaf: Any, target: Any) -> Any:
    """Class scores that are all alike: probabilities if they are, else their logarithms. Others stay."""
    dimension = class_dimension(leaf, target) if isinstance(leaf, Tensor) else None
    if dimension is None:
        return leaf
    probability = 1 / leaf.shape[dimension]
    return torch.full_like(leaf, probability if leaf.min() >= 0 else math.log(probability))


def _constant_prediction(calibration: Calibration, calibrated: Any) -> Callable[[Any, int], Any]:
    """(output, samples in it) -> what it would be if it were always the mean of `calibrated`, the output on the first
    calibration batch; tensors of other shapes stay."""
    size = batch_size(calibration.batches[0])
    means = [
        leaf.mean(0) if is_batched(leaf, size) and leaf.is_floating_point() else None for leaf in leaves(calibrated)
    ]

    def change(output: Any, size: int) -> Any:
        left = iter(means)

        def constant(leaf: Any) -> Any:
            mean = next(left, None)
            if mean is None or not is_batched(leaf, size) or leaf.shape[1:] != mean.shape:
                return leaf
            return mean.expand_as(leaf)

        return map_leaves(output, constant)

    return change
