"""Ternary and binary weights with two or one learned scale.

`ternary`: zero below a threshold of 0.7 mean magnitudes (Li and Liu, TWN, 2016), else one of two learned
scales, one for each sign (Zhu et al., TTQ, ICLR 2017). `binary`: sign times one scale, the mean magnitude
at first (Rastegari et al., XNOR-Net, ECCV 2016). Weights that pruning set to zero stay zero in both.

Not for tensors of one value, which are stored as a constant anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, IntegerCoding, register, straight_through
from autocompress.techniques.integers import on_grid, step_of

_THRESHOLD = 0.7


class Ternary(IntegerCoding):
    """Learned parameters: log2 of the scale of positive and of negative weights (binary: of both)."""

    tag = 2

    def choices(self) -> Sequence[Choice]:
        return ("ternary", "binary")

    def bits(self, choice: Choice) -> float:
        return 1.6 if choice == "ternary" else 1.0

    def layout(self, choice: Choice) -> tuple[int, int]:
        return 0, 0

    def parameters(self, choice: Choice, shape: tuple[int, ...]) -> int:
        return 2 if choice == "ternary" else 1

    def initial(self, weight: Tensor, choice: Choice, clipping: str = "mse") -> Tensor:
        """The mean magnitude of what is not zero after rounding."""
        w = weight.detach().float()
        codes = _round(w / _unit(w, choice))
        sides = (codes > 0, codes < 0) if choice == "ternary" else (codes != 0,)
        scales = [w[side].abs().mean() if side.any() else w.new_ones(()) for side in sides]
        return torch.stack(scales).log2()

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        codes = _round(weight.detach() / _unit(weight.detach(), choice))
        scale = _scale(codes, parameters)
        return straight_through(codes, weight / scale.detach()) * scale

    def scaled(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        if choice == "binary":
            return straight_through(weight.detach().sign(), weight)
        return weight / _unit(weight.detach(), choice)

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        codes = _round(weight.detach() / _unit(weight.detach(), choice))
        return Coded(codes.to(torch.int32).cpu().numpy(), tuple(on_grid(parameters.detach()).tolist()))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        codes = torch.from_numpy(coded.codes.astype(np.float32))
        return codes * _scale(codes, torch.tensor(coded.parameters, dtype=torch.float32))


def _unit(weight: Tensor, choice: Choice) -> Tensor:
    """The magnitude that half way up rounds to one; scalar tensor."""
    if choice == "binary":
        return torch.full((), torch.finfo(torch.float32).tiny, device=weight.device)
    kept = weight[weight != 0].abs()
    return 2 * _THRESHOLD * kept.mean() if kept.numel() else weight.new_ones(())


def _round(scaled: Tensor) -> Tensor:
    return torch.where(scaled.abs() > 0.5, scaled.sign(), 0.0)


def _scale(codes: Tensor, parameters: Tensor) -> Tensor:
    scales = step_of(parameters, 1)
    return torch.where(codes > 0, scales[0], scales[-1])


register(Ternary())
