"""Rounding by rate and distortion: codes that cost few bits and leave a layer's outputs where they should be.

Weight after weight takes the code of least error, in the outputs and with all others as they are by now, plus the price
of its bits: coordinate descent, as QuantEase (Behdin et al., 2023) rounds, here with a price. What a code costs is told
by the histogram of all codes. Rate and distortion of a whole layer against each other make files of the same
accuracy a fifth to two fifths smaller than deciding each weight alone (CERWU, Conzelmann and Bamler, 2025).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.artifact.coder import compiled
from autocompress.techniques.base import Steps
from autocompress.trial.rate import bits_of_magnitudes

Array = NDArray[Any]
_ROUNDS = 4
_COLUMNS, _OUTPUTS = 64, 4096
"""Inputs between two corrections of all that is left, and outputs at a time."""


def rounded(start: Tensor, free: Tensor, best: Tensor, hessian: Tensor, price: Tensor, steps: Steps) -> Tensor:
    """Codes of a layer, as whole numbers in float64 [groups, outputs, inputs].

    start: codes as well, from which only those that are `free` (bool) may change. best: float64, as `start`: weights
    whose outputs are wanted. hessian: float64 [groups, inputs, inputs], by which an error e of an output's weights
    counts e H e. price: float64 [groups, outputs, 1], of a bit, in that unit.
    The size of the steps: float64.
    """
    codes, sizes = start.clone(), steps.size.expand_as(start)
    for _ in range(_ROUNDS):
        bits = bits_of_magnitudes(codes, max(-steps.low, steps.high))
        for first in range(0, codes.shape[1], _OUTPUTS):
            some = slice(first, first + _OUTPUTS)
            own = steps._replace(size=sizes[:, some])
            _improve(codes[:, some], free[:, some], best[:, some], hessian, price[:, some, 0], bits, own)
    return codes


def _improve(
    codes: Tensor, free: Tensor, best: Tensor, hessian: Tensor, price: Tensor, bits: Tensor, steps: Steps
) -> None:
    """One round, in place. free: bool, which may change. price: [groups, outputs]. bits: float64, of each magnitude."""
    pull = (codes * steps.size - best) @ hessian
    prices, table, low, high = _array(price), _array(bits), float(steps.low), float(steps.high)
    for first in range(0, codes.shape[2], _COLUMNS):
        these = slice(first, first + _COLUMNS)
        before, size = codes[:, :, these], steps.size[:, :, these]
        after = _array(before).copy()
        may, unit, near, block = map(_array, (free[:, :, these], size, pull[:, :, these], hessian[:, these, these]))
        _descend(after, may, unit, near, block, prices, table, low, high)
        moved = torch.from_numpy(after).to(before) - before
        codes[:, :, these] += moved
        pull += (moved * size) @ hessian[:, these]


def _array(values: Tensor) -> Array:
    """Contiguous: one type for all calls, which is compiled once."""
    return np.ascontiguousarray(values.cpu().numpy())


@compiled()
def _descend(
    codes: Array,
    free: Array,
    size: Array,
    pull: Array,
    hessian: Array,
    price: Array,
    bits: Array,
    low: float,
    high: float,
) -> None:
    """The columns of a block, one after the other, in place; the arrays are [groups, outputs, columns]."""
    groups, outputs, columns = codes.shape
    near = np.empty(columns)
    for group in range(groups):
        for output in range(outputs):
            near[:] = pull[group, output]
            for at in range(columns):
                if not free[group, output, at]:
                    continue
                now, unit, curvature = codes[group, output, at], size[group, output, at], hessian[group, at, at]
                wanted = now - near[at] / (curvature * unit)
                if not np.isfinite(wanted):
                    continue
                below, least, chosen = np.floor(wanted), np.inf, now
                for option in (below, below + 1, 0.0):
                    code = min(max(option, low), high)
                    cost = curvature * (unit * (code - wanted)) ** 2 + price[group, output] * bits[int(abs(code))]
                    if cost < least:
                        least, chosen = cost, code
                codes[group, output, at] = chosen
                move = (chosen - now) * unit
                if move != 0:
                    for other in range(at + 1, columns):
                        near[other] += move * hessian[group, at, other]
