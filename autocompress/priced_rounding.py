"""Rounding by rate and distortion: codes that cost few bits and leave a layer's outputs where they should be.

Weight after weight takes the code of least error, in the outputs and with all others as they are by now, plus the price
of its bits: coordinate descent, as QuantEase (Behdin et al., 2023) rounds, here with a price. What a code costs is told
by the histogram of all codes. Rate and distortion of a whole layer against each other make files of the same
accuracy a fifth to two fifths smaller than deciding each weight alone (CERWU, Conzelmann and Bamler, 2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autocompress.rate import bits_of_magnitudes

_ROUNDS = 4
_COLUMNS, _OUTPUTS = 64, 4096
"""Inputs between two corrections of all that is left, and outputs at a time."""


class Grid(NamedTuple):
    """Values that weights may have: code times step, codes from `low` to `high`. step: float64, broadcasts to
    [groups, outputs, inputs]."""

    step: Tensor
    low: int
    high: int


def rounded(start: Tensor, free: Tensor, best: Tensor, hessian: Tensor, price: Tensor, grid: Grid) -> Tensor:
    """Codes of a layer, as whole numbers in float64 [groups, outputs, inputs].

    start: codes as well, from which only those that are `free` (bool) may change. best: float64, as `start`: weights
    whose outputs are wanted. hessian: float64 [groups, inputs, inputs], by which an error e of an output's weights
    counts e H e. price: float64 [groups, outputs, 1], of a bit, in that unit.
    """
    codes, step = start.clone(), grid.step.expand_as(start)
    for _ in range(_ROUNDS):
        bits = bits_of_magnitudes(codes, max(-grid.low, grid.high))
        for first in range(0, codes.shape[1], _OUTPUTS):
            some = slice(first, first + _OUTPUTS)
            own = grid._replace(step=step[:, some])
            _improve(codes[:, some], free[:, some], best[:, some], hessian, price[:, some, 0], bits, own)
    return codes


def _improve(
    codes: Tensor, free: Tensor, best: Tensor, hessian: Tensor, price: Tensor, bits: Tensor, grid: Grid
) -> None:
    """One round, in place. free: bool, which may change. price: [groups, outputs]. bits: float64, of each magnitude."""
    pull = (codes * grid.step - best) @ hessian
    for first in range(0, codes.shape[2], _COLUMNS):
        these = slice(first, first + _COLUMNS)
        block, before, near = hessian[:, these, these], codes[:, :, these].clone(), pull[:, :, these].clone()
        for at in range(block.shape[1]):
            now, step = codes[:, :, first + at], grid.step[:, :, first + at]
            curvature = block[:, at, at, None]
            wanted = now - near[:, :, at] / (curvature * step)
            options = torch.stack([wanted.floor(), wanted.floor() + 1, torch.zeros_like(wanted)])
            options.clamp_(grid.low, grid.high)
            costs = curvature * (step * (options - wanted)).square() + price * bits[options.abs().long()]
            code = torch.where(free[:, :, first + at], options.gather(0, costs.argmin(0)[None])[0], now)
            near += ((code - now) * step)[:, :, None] * block[:, None, at]
            codes[:, :, first + at] = code
        pull += ((codes[:, :, these] - before) * grid.step[:, :, these]) @ hessian[:, these]
