"""A differentiable estimate of the bits that the entropy coder will spend.

Zero-order entropy of the codes, scaled to what the context-modelling coder really needed for these
weights (Oktay et al., ICLR 2020, learn such a density; here the histogram of the codes is the density).
For the gradient the histogram is made to fall with magnitude (isotonic regression) and its bits are
interpolated between codes: a gap that pruning left is no wall, and every step towards zero is cheaper.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from autocompress.artifact import pack
from autocompress.artifact.container import decode_artifact
from autocompress.compression import Candidate, ShadowedLayer
from autocompress.techniques.base import IntegerCoding


class RateModel:
    """Bits of a candidate's weights; `refresh` fits it to the present weights."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.tables: dict[str, Tensor] = {}
        """Layer -> bits of each magnitude, sign included, as the codes are."""
        self._falling: dict[str, tuple[Tensor, Tensor]] = {}
        """The same of a histogram that falls with magnitude, and by how much they rise to the next."""
        self.factors: dict[str, float] = {}
        self.fixed_bytes = 0.0
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the histograms of the codes as they are now."""
        for name, shadow in self.candidate.layers.items():
            if isinstance(shadow.coding, IntegerCoding):
                magnitude = _magnitude(shadow)
                top = 1 << shadow.coding.layout(shadow.choice)[1]
                counts = torch.bincount(magnitude.round().long().flatten(), minlength=top + 1).float() + 0.1
                counts[1:] /= 2  # of each sign
                self.tables[name] = _bits(counts)
                falling = isotonic_regression(counts.cpu().numpy(), increasing=False).x
                table = _bits(torch.from_numpy(falling.copy()).to(counts))
                self._falling[name] = table, torch.cat([table.diff(), table.new_zeros(1)])

    @torch.no_grad()
    def calibrate(self) -> None:
        """Fit the scale of each layer to what the coder spends on its present weights."""
        self.refresh()
        artifact = decode_artifact(pack(self.candidate.weights(), self.candidate.recipe))
        self.fixed_bytes = float(artifact.size_bytes)
        for name, shadow in self.candidate.layers.items():
            spent = artifact.tensors[shadow.key].size_bytes
            self.fixed_bytes -= spent
            self.factors[name] = 8 * spent / max(float(self._entropy(name)), 1.0)

    def bits(self) -> Tensor:
        """float32 scalar: estimated bits of all layers, differentiable in the dense weights."""
        return torch.stack([self._layer_bits(name) for name in self.candidate.layers]).sum()

    @torch.no_grad()
    def bytes(self) -> float:
        """Estimated bytes of the file."""
        layers = sum(float(self._entropy(name)) * self.factors.get(name, 1.0) for name in self.candidate.layers)
        return self.fixed_bytes + layers / 8

    def _entropy(self, name: str) -> Tensor:
        """float32 scalar: bits of the codes as they are."""
        shadow = self.candidate.layers[name]
        if name not in self.tables:
            kept = shadow.dense.new_tensor(shadow.dense.numel()) if shadow.mask is None else shadow.mask.count_nonzero()
            return kept * shadow.coding.bits(shadow.choice)
        return self.tables[name][_magnitude(shadow).round().long()].sum()

    def _layer_bits(self, name: str) -> Tensor:
        shadow = self.candidate.layers[name]
        if name not in self.tables:
            return self._entropy(name)
        bits: Tensor = _Interpolated.apply(_in_steps(shadow), self._falling[name])  # type: ignore[no-untyped-call]
        return bits


class _Interpolated(torch.autograd.Function):
    """float32 scalar: bits of all weights, which are given in steps. line: as in `RateModel._falling`."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, line: tuple[Tensor, Tensor]) -> Tensor:
        magnitude = scaled.abs()
        at = magnitude.int().clamp_max_(len(line[0]) - 1)
        bits, rise = (table.index_select(0, at.flatten()).view_as(at) for table in line)
        ctx.save_for_backward(rise * scaled.sign())
        return torch.addcmul(bits, magnitude - at, rise).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


def _bits(counts: Tensor) -> Tensor:
    """Bits of each magnitude, float32 [n], from the counts of its codes of either sign."""
    return -(counts / (2 * counts.sum() - counts[0])).log2()


def _in_steps(shadow: ShadowedLayer) -> Tensor:
    """The weight in steps, float32, shape of the layer; differentiable in the dense weights."""
    assert isinstance(shadow.coding, IntegerCoding)
    return shadow.coding.scaled(shadow.masked(), shadow.choice, shadow.learned.detach())


def _magnitude(shadow: ShadowedLayer) -> Tensor:
    """|weight| in steps, at most the largest code; float32, shape of the layer."""
    assert isinstance(shadow.coding, IntegerCoding)
    return _in_steps(shadow).abs().clamp_max(1 << shadow.coding.layout(shadow.choice)[1])
