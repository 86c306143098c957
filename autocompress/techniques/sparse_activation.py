"""Sparse activations: most values of a layer's output are zero.

`fatrelu-0.8`: a ReLU that passes only what lies above a threshold, set so that 80% of the original's inputs
fall below it and trained no further (Kurtz et al., FATReLU, ICML 2020). `topk-0.2`: of each sample the largest 20%
pass (k-winners-take-all; Makhzani and Frey, 2013).

Not for functional calls, and modules with parameters such as PReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress.model.replacement import Elementwise
from autocompress.techniques.activation import FittedActivation, offer

_SAMPLE = 1 << 20


class ThresholdedReLU(FittedActivation):
    """threshold: float32 scalar; inputs at or below it become zero."""

    threshold: Tensor

    def __init__(self, zeros: float) -> None:
        super().__init__()
        self.zeros = zeros
        self.register_buffer("threshold", torch.zeros(()))

    def fit(self, old: nn.Module, inputs: Tensor) -> None:
        sample = inputs[:: len(inputs) // _SAMPLE + 1]
        self.threshold.copy_(torch.quantile(sample, self.zeros).clamp_min(0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > self.threshold.to(x.dtype), x, 0)


class TopK(Elementwise):
    """Keeps the largest `share` of the values of each sample (all dimensions but the first)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        count = max(1, round(self.share * flat.shape[1]))
        least = flat.detach().topk(count, dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0).view_as(x)


def _share(choice: str) -> float:
    share = float(choice.rpartition("-")[2])
    if not 0 < share < 1:
        raise ValueError(choice)
    return share


offer("fatrelu-0.8", r"fatrelu-[\d.]+", lambda choice: ThresholdedReLU(_share(choice)))
offer("topk-0.2", r"topk-[\d.]+", lambda choice: TopK(_share(choice)))
