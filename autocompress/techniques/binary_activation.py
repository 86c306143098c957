"""Binary activations: one bit a value, times a learned scale.

Forward, both are the unit step. Backward, `step` passes the gradient where |x| is at most its mean
(Courbariaux et al., BNN, 2016), `step-sigmoid` that of a sigmoid as steep at zero (Bengio et al., 2013).

Not for functional calls, and modules with parameters such as PReLU; deep stacks of it need more epochs than
a short fine-tuning has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress.techniques.activation import FittedActivation, offer
from autocompress.techniques.base import straight_through


class BinaryActivation(FittedActivation):
    """scale: float32 scalar, what a one stands for; at first the mean of the original's positive outputs.
    width: of the surrogate, needed for training only."""

    width: Tensor

    def __init__(self, smooth: bool) -> None:
        super().__init__()
        self.smooth = smooth
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("width", torch.ones(()), persistent=False)

    def fit(self, old: nn.Module, inputs: Tensor) -> None:
        self.width.copy_(2 * inputs.abs().mean().clamp_min(1e-6))
        outputs = old(inputs)
        positive = outputs[inputs > 0]
        self.scale.copy_(positive.mean().clamp_min(1e-3) if positive.numel() else torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        near = x / self.width.to(x.dtype)
        surrogate = torch.sigmoid(4 * near) if self.smooth else near.clamp(-0.5, 0.5)
        return straight_through((x > 0).to(x.dtype), surrogate) * self.scale.to(x.dtype)


offer("step", "step", lambda choice: BinaryActivation(False))
offer("step-sigmoid", "step-sigmoid", lambda choice: BinaryActivation(True))
