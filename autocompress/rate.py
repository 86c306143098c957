"""A differentiable estimate of the bits that the entropy coder will spend.

Zero-order entropy of the codes, interpolated between integer magnitudes so that it has a gradient, and
scaled to what the context-modelling coder really needed for these weights (Oktay et al., ICLR 2020,
learn such a density; here the histogram of the codes is the density).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.artifact import pack
from autocompress.compression import Candidate, ShadowedLayer


class RateModel:
    """Bits of a candidate's weights; `refresh` fits it to the present weights."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.tables: dict[str, Tensor] = {}
        self.factor = 1.0
        self.fixed_bytes = 0.0
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the histograms of the codes as they are now."""
        for name, shadow in self.candidate.layers.items():
            if shadow.coding.layout(shadow.choice)[0] == 0:
                magnitude = _magnitude(shadow)
                top = 1 << shadow.coding.layout(shadow.choice)[1]
                counts = torch.bincount(magnitude.round().long().flatten(), minlength=top + 1).float() + 0.1
                bits = -(counts / counts.sum()).log2()
                bits[1:] += 1  # the sign
                self.tables[name] = torch.cummax(bits, 0).values if bits[0] < bits[1] else bits

    @torch.no_grad()
    def calibrate(self) -> None:
        """Fit the scale to what the coder spends on the present weights."""
        self.refresh()
        spent = 8 * len(pack(self.candidate.weights(), self.candidate.recipe))
        entropy = float(self.bits())
        self.fixed_bytes = 0.0
        self.factor = spent / max(entropy, 1.0)

    def bits(self) -> Tensor:
        """float32 scalar: estimated bits of all layers, differentiable in the dense weights."""
        total = torch.zeros((), device=next(iter(self.candidate.layers.values())).dense.device)
        for name, shadow in self.candidate.layers.items():
            if name in self.tables:
                table = self.tables[name]
                magnitude = _magnitude(shadow)
                low = magnitude.detach().floor().long().clamp_max(len(table) - 2)
                share = magnitude - low
                total = total + (table[low] * (1 - share) + table[low + 1] * share).sum()
            else:
                kept = shadow.dense.numel() if shadow.mask is None else int(shadow.mask.sum())
                total = total + kept * shadow.coding.bits(shadow.choice)
        return total

    def bytes(self) -> float:
        """Estimated bytes of the file."""
        with torch.no_grad():
            return float(self.bits()) * self.factor / 8


def _magnitude(shadow: ShadowedLayer) -> Tensor:
    """|weight| in steps, at most the largest code; float32, shape of the layer."""
    scaled = shadow.coding.scaled(shadow.masked(), shadow.choice, shadow.learned.detach())
    return scaled.abs().clamp_max(1 << shadow.coding.layout(shadow.choice)[1])
