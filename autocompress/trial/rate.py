"""An estimate of the bits that the entropy coder will spend, and its gradient.

Zero-order entropy of the codes, scaled to what the context-modelling coder really needed for these
weights (Oktay et al., ICLR 2020, learn such a density; here the histogram of the codes is the density).
For the gradient the histogram is made to fall with magnitude (isotonic regression) and its bits are
interpolated between codes: a gap that pruning left is no wall, and every step towards zero is cheaper.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from autocompress.artifact import Artifact, pack
from autocompress.artifact.container import decode_artifact
from autocompress.techniques.base import IntegerCoding
from autocompress.trial.compression import Candidate, ShadowedLayer


class RateModel:
    """Bits of a candidate's weights, as they were at the last `refresh`."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.bits: dict[str, Tensor] = {}
        """Layer -> float32 scalar, of all its codes."""
        self.tables: dict[str, Tensor] = {}
        """Layer -> bits of each magnitude, sign included, as the codes are."""
        self._slopes: dict[str, Tensor] = {}
        """Layer -> by how much those of a histogram that falls with magnitude rise from each code to the next, from the
        most negative one on."""
        self.factors: dict[str, float] = {}
        self.fixed_bytes = 0.0
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the histograms of the codes as they are now."""
        for name, shadow in self.candidate.layers.items():
            if isinstance(shadow.coding, IntegerCoding):
                largest = 1 << shadow.coding.layout(shadow.choice)[1]
                codes = _in_steps(shadow).abs().clamp_max_(largest).round_().long().flatten()
                found = torch.bincount(codes, minlength=largest + 1).float()
                counts = _of_either_sign(found)
                self.tables[name] = _in_bits(counts)
                self.bits[name] = (found * self.tables[name]).sum()
                table = _falling_bits(counts)
                rises = torch.cat([table.diff(), table.new_zeros(1)])
                self._slopes[name] = torch.cat([-rises.flip(0), rises])
            else:
                whole = shadow.dense.new_tensor(float(shadow.dense.numel()))
                kept = whole if shadow.mask is None else shadow.mask.sum()
                self.bits[name] = kept * shadow.coding.bits(shadow.choice)

    @torch.no_grad()
    def calibrate(self) -> Artifact:
        """Fit the scale of each layer to what the coder spends on its present weights, which it returns."""
        self.refresh()
        artifact = decode_artifact(pack(self.candidate.weights(), self.candidate.recipe))
        self.fixed_bytes = float(artifact.size_bytes)
        for name, shadow in self.candidate.layers.items():
            spent = artifact.tensors[shadow.key].size_bytes
            self.fixed_bytes -= spent
            self.factors[name] = 8 * spent / max(float(self.bits[name]), 1.0)
        return artifact

    def of_bit(self, price: Tensor) -> Tensor:
        """What one bit is worth where half of all bits are worth `price`; float32 scalar, as `price`."""
        return price / (math.log(2) * torch.stack([*self.bits.values()]).sum().clamp_min(1.0))

    def backpropagate(self, price: Tensor) -> None:
        """Add the gradient of price x log2 of all bits to those of the dense weights. price: float32 scalar."""
        of_bit = self.of_bit(price)
        roots, gradients = [], []
        for name, slopes in self._slopes.items():
            scaled = _in_steps(self.candidate.layers[name])
            codes = len(slopes)
            below = (scaled.detach() + codes // 2).clamp_(0, codes - 1).int()
            roots.append(scaled)
            gradients.append((of_bit * slopes).index_select(0, below.flatten()).view_as(scaled))
        torch.autograd.backward(roots, gradients)

    def bytes(self) -> float:
        """Estimated bytes of the file."""
        return self.fixed_bytes + sum(float(b) * self.factors.get(name, 1.0) for name, b in self.bits.items()) / 8


def bits_of_magnitudes(codes: Tensor, largest: int) -> Tensor:
    """Bits of each magnitude up to `largest`, sign included, that never fall as it grows: float64 [largest + 1]."""
    found = torch.bincount(codes.abs().long().flatten(), minlength=largest + 1).double()
    return _falling_bits(_of_either_sign(found))


def _falling_bits(counts: Tensor) -> Tensor:
    """By the counts that are nearest and fall with magnitude; as `counts`."""
    falling = isotonic_regression(counts.cpu().numpy(), increasing=False).x
    return _in_bits(torch.from_numpy(falling.copy()).to(counts))


def _of_either_sign(found: Tensor) -> Tensor:
    """How often codes of each sign were found, from how often their magnitude was, and never not at all."""
    counts = found + 0.1
    counts[1:] /= 2
    return counts


def _in_bits(counts: Tensor) -> Tensor:
    """Of each magnitude, [n], from the counts of its codes of either sign."""
    return -(counts / (2 * counts.sum() - counts[0])).log2()


def _in_steps(shadow: ShadowedLayer) -> Tensor:
    """The weight in steps, float32, shape of the layer; differentiable in the dense weights."""
    assert isinstance(shadow.coding, IntegerCoding)
    return shadow.coding.scaled(shadow.masked(), shadow.choice, shadow.learned.detach())
