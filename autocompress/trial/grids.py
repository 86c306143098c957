"""Which weights lie on a grid: those of kernels do by their shape, those of a linear layer if it reads an image or a
signal, whose inputs resemble their neighbours, side by side and, in an image, from one row to the next. None that is
pruned or quantised already counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.model.anatomy import Anatomy, Layer
from autocompress.model.hooks import Hook, forward_hooks
from autocompress.model.surgery import owners
from autocompress.task import Calibration

_FEWEST, _MOST, _SAMPLE = 32, 1 << 20, 4096
"""Inputs of a layer, at least; values of them, and weights, that are looked at."""
_ALIKE, _ROWS_ALIKE = 0.6, 0.5
"""The least correlation of neighbours in a row, and of those in a column."""
_AS_HIGH = 0.8
"""Of the highest correlation: the first width of about as much is taken, not that of a whole colour."""
_DENSE, _VARIED = 0.7, 0.25
"""Of weights that are not compressed yet, the least share that is not zero, and of different values."""


def with_grids(anatomy: Anatomy, model: nn.Module, run: Calibration) -> Anatomy:
    """The same with the `grid` of each layer. run: runs the model on a batch."""
    places, read = owners(model), dict[str, tuple[int, ...]]()
    modules = {layer.name: places[layer.parameter][0][0] for layer in anatomy.layers}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.layout == torch.strided and x.numel() and name not in read:
                read[name] = grid_of(x.detach().reshape(-1, x.shape[-1]))

        return hook

    linear = {name: modules[name] for name in anatomy.inputs if isinstance(modules.get(name), nn.Linear)}
    with forward_hooks((module, watch(name)) for name, module in linear.items()), torch.no_grad():
        run(model)

    def grid(layer: Layer) -> tuple[int, ...]:
        module, weight = modules[layer.name], getattr(*places[layer.parameter][0])
        if weight.is_complex() or not _is_free(weight):
            return ()
        if isinstance(module, nn.modules.conv._ConvNd):
            return tuple(module.kernel_size) if max(module.kernel_size) > 2 else ()
        return read.get(layer.name, ())

    return replace(anatomy, layers=tuple(replace(layer, grid=grid(layer)) for layer in anatomy.layers))


def _is_free(weight: Tensor) -> bool:
    """Whether it is not pruned or quantised yet, which another basis would undo."""
    some = weight.detach().flatten()[:_SAMPLE]
    return int(some.count_nonzero()) > _DENSE * len(some) and len(torch.unique(some)) > _VARIED * len(some)


def grid_of(inputs: Tensor) -> tuple[int, ...]:
    """(rows, columns) of the image that each row of float [n, inputs] is, (inputs,) if it is a signal, () if neither.

    By the autocorrelation of what differs from one row to the other, and not of all inputs alike (Wiener-Khinchin
    theorem): that of an image is largest at its width.
    """
    count = inputs.shape[1]
    values = inputs[: _MOST // max(count, 1)].double()
    values = values - values.mean(0)
    values = values - values.mean(1, keepdim=True)
    power = values.square().mean()
    if count < _FEWEST or (values[:, 1:] * values[:, :-1]).mean() < _ALIKE * power or not 0 < power < math.inf:
        return ()
    spectrum = torch.fft.rfft(values, 2 * count).abs().square().mean(0)
    alike = torch.fft.irfft(spectrum, 2 * count)[:count] / torch.arange(count, 0, -1, device=values.device) / power
    near: list[float] = alike.tolist()
    widths = [w for w in range(3, count // 2 + 1) if count % w == 0 and near[w] > max(near[w - 1], near[w + 1])]
    highest = max((near[w] for w in widths), default=0.0)
    if highest < _ROWS_ALIKE:
        return (count,)
    width = next(w for w in widths if near[w] > _AS_HIGH * highest)
    return count // width, width
