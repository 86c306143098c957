"""Piecewise linear activations: k segments fitted to the original function and trained further.

Learned piecewise linear units (Agostinelli et al., APL, 2014), with knots evenly spaced over the range that
the calibration batch shows. Beyond it the outer segments go on, so that the function does not saturate.

Not for functional calls, and modules with parameters such as PReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress.techniques.activation import FittedActivation, offer


class PiecewiseLinear(FittedActivation):
    """values: float32 [k + 1], the function at its knots. low, high: where the first and last knot are."""

    low: Tensor
    high: Tensor

    def __init__(self, segments: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(0, 1, segments + 1))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def fit(self, old: nn.Module, inputs: Tensor) -> None:
        self.low.copy_(inputs.amin())
        self.high.copy_(inputs.amax().clamp_min(self.low + 1e-3))
        knots = torch.lerp(self.low, self.high, torch.linspace(0, 1, len(self.values), device=self.low.device))
        self.values.copy_(old(knots).float())

    def forward(self, x: Tensor) -> Tensor:
        segments = len(self.values) - 1
        place = (x.float() - self.low) / (self.high - self.low) * segments
        left = place.detach().floor().clamp(0, segments - 1).long()
        values = self.values
        return (values[left] + (place - left) * (values[left + 1] - values[left])).to(x.dtype)


def _make(choice: str) -> nn.Module:
    segments = int(choice.rpartition("-")[2])
    if not 2 <= segments <= 64:
        raise ValueError(choice)
    return PiecewiseLinear(segments)


offer("piecewise-8", r"piecewise-\d+", _make)
