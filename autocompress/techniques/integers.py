"""Integer weights of 2 to 8 bits with one learned step a tensor.

Learned step size quantisation (Esser et al., LSQ, ICLR 2020): the weight is `code * step` with `code`
in [-2^(b-1), 2^(b-1) - 1]; rounding is straight-through, and the step has its own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, Coding, register, straight_through

_CHOICES = tuple(f"int{bits}" for bits in range(8, 1, -1))


def _limits(choice: Choice) -> tuple[int, int]:
    half = 1 << (int(str(choice)[3:]) - 1)
    return -half, half - 1


def _on_grid(logarithm: Tensor) -> Tensor:
    return straight_through((logarithm * 32).round() / 32, logarithm)


def _step(logarithm: Tensor) -> Tensor:
    """float32; the power is taken in float64, so that every machine rounds to the same step."""
    return torch.exp2(_on_grid(logarithm).double()).float()


class Integers(Coding):
    """The learned parameter is log2 of the step, so that it needs no scale of its own; it takes
    multiples of 1/32, which cost about a byte in the file."""

    tag = 1

    def choices(self) -> Sequence[Choice]:
        return _CHOICES

    def bits(self, choice: Choice) -> float:
        return float(str(choice)[3:])

    def layout(self, choice: Choice) -> tuple[int, int]:
        return 0, int(self.bits(choice)) - 1

    def parameters(self, choice: Choice) -> int:
        return 1

    def initial(self, weight: Tensor, choice: Choice) -> Tensor:
        """The step of least squared error among 40 between 1/20 and all of the largest magnitude.

        Zeros cost nothing under any step, so pruned tensors are fitted to what is left of them.
        """
        w = weight.detach().flatten().float()
        if not w.any():
            return torch.zeros(1)
        largest = w.abs().max()
        if w.numel() > 65536:
            w = w[:: w.numel() // 65536 + 1]
        low, high = _limits(choice)
        steps = largest / high * torch.logspace(-1.3, 0, 40, device=w.device)
        errors = [((w / s).round().clamp(low, high) * s - w).square().sum() for s in steps]
        return steps[int(torch.stack(errors).argmin())].view(1).log2()

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        low, high = _limits(choice)
        step = _step(parameters)
        scaled = (weight / step).clamp(low, high)
        return straight_through(scaled.round(), scaled) * step

    def scaled(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        return weight / _step(parameters)

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        low, high = _limits(choice)
        codes = (weight.detach() / _step(parameters.detach())).clamp_(low, high).round_()
        return Coded(codes.to(torch.int32).cpu().numpy(), (float(_on_grid(parameters.detach())),))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        step = _step(torch.tensor(coded.parameters[0], dtype=torch.float32))
        return torch.from_numpy(coded.codes.astype(np.float32)).mul_(step)


register(Integers())
