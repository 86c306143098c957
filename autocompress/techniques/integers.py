"""Integer weights of 2 to 8 bits with learned steps: one a tensor, or one an output channel.

Learned step size quantisation (Esser et al., LSQ, ICLR 2020): the weight is `code * step` with `code`
in [-2^(b-1), 2^(b-1) - 1]; rounding is straight-through, and the step has its own gradient.

Not for tensors with values that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, IntegerCoding, Steps, register, straight_through
from autocompress.techniques.clipping import FRACTIONS, clip_range

_WIDTHS = range(8, 1, -1)
_PER_CHANNEL = "-channel"
_CHOICES = (*(f"int{bits}" for bits in _WIDTHS), *(f"int{bits}{_PER_CHANNEL}" for bits in _WIDTHS))
_SAMPLE = 65536


def _limits(choice: Choice) -> tuple[int, int]:
    half = 1 << (int(str(choice)[3]) - 1)
    return -half, half - 1


def _range(choice: Choice) -> tuple[float, float]:
    """The limits and a little more: a weight on the outermost code is not beyond it."""
    low, high = _limits(choice)
    return low - 1e-3, high + 1e-3


def _inside(values: Tensor, scaled: Tensor, choice: Choice) -> Tensor:
    """`values` where `scaled` is within the range, else 0."""
    kept: Tensor = torch.ops.aten.hardtanh_backward(values, scaled, *_range(choice))
    return kept


def on_grid(logarithm: Tensor) -> Tensor:
    """Rounded to multiples of 1/32, which cost about a byte in a file; differentiable."""
    rounded = (logarithm * 32).round() / 32
    return straight_through(rounded, logarithm) if logarithm.requires_grad else rounded


def step_of(logarithm: Tensor, dimensions: int) -> Tensor:
    """2^logarithm, float32, shaped to multiply a tensor of so many dimensions along its first; the power
    is taken in float64, so that every machine rounds to the same step."""
    step = torch.exp2(on_grid(logarithm).double()).float()
    return step if len(step) == 1 else step.view(-1, *[1] * (dimensions - 1))


class _Quantised(torch.autograd.Function):
    """LSQ as one operation: it runs for every layer in every step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logarithm: Tensor, choice: Choice) -> Tensor:
        step = step_of(logarithm.detach(), weight.ndim)
        scaled = weight / step
        codes = scaled.round().clamp_(*_limits(choice))
        ctx.save_for_backward(scaled, codes, step)
        ctx.choice = choice
        return codes * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        scaled, codes, step = ctx.saved_tensors
        off = codes - _inside(scaled, scaled, ctx.choice)
        of_step = (gradient * off).sum_to_size(step.shape) * step * math.log(2)
        return _inside(gradient, scaled, ctx.choice), of_step.flatten(), None


class Integers(IntegerCoding):
    """The learned parameters are log2 of the steps, so that they need no scale of their own."""

    tag = 1

    def choices(self) -> Sequence[Choice]:
        return _CHOICES

    def bits(self, choice: Choice) -> float:
        return float(str(choice)[3])

    def layout(self, choice: Choice) -> tuple[int, int]:
        return 0, int(self.bits(choice)) - 1

    def parameters(self, choice: Choice, shape: tuple[int, ...]) -> int:
        return shape[0] if str(choice).endswith(_PER_CHANNEL) and len(shape) > 1 else 1

    def initial(self, weight: Tensor, choice: Choice, clipping: str = "mse") -> Tensor:
        """The steps of least squared error, or by `clipping`, among 40 between 1/20 and all of the largest magnitude.

        Zeros cost nothing under any step, so pruned tensors are fitted to what is left of them.
        """
        count = self.parameters(choice, tuple(weight.shape))
        if not weight.numel():
            return weight.new_zeros(count, dtype=torch.float32)
        rows = weight.detach().float().reshape(count, -1)
        largest = rows.abs().amax(1)
        largest = torch.where(largest > 0, largest, largest.amax() if largest.any() else 1.0)
        rows = rows[:, :: rows.numel() // _SAMPLE + 1]
        low, high = _limits(choice)
        if clipping != "mse":
            ranges = [clip_range(torch.cat([row, -row]), 2 * high, clipping)[1] for row in rows]
            return (torch.stack(ranges) / high).clamp_min(torch.finfo(torch.float32).tiny).log2()
        steps = largest / high * FRACTIONS.to(rows.device)[:, None]
        errors = [((rows / s[:, None]).round().clamp(low, high) * s[:, None] - rows).square().sum(1) for s in steps]
        best = torch.stack(errors).argmin(0)
        return steps.gather(0, best[None])[0].log2()

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        quantised: Tensor = _Quantised.apply(weight, parameters, choice)  # type: ignore[no-untyped-call]
        return quantised

    def scaled(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        # hardtanh and its gradient are several times as fast as clamp and its own
        return nn.functional.hardtanh(weight / step_of(parameters, weight.ndim), *_range(choice))

    def steps(self, choice: Choice, parameters: Tensor, dimensions: int) -> Steps:
        return Steps(step_of(parameters, dimensions), *_limits(choice))

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        codes = self.scaled(weight.detach(), choice, parameters.detach()).round_()
        return Coded(codes.to(torch.int32).cpu().numpy(), tuple(on_grid(parameters.detach()).tolist()))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        step = step_of(torch.tensor(coded.parameters, dtype=torch.float32), coded.codes.ndim)
        return torch.from_numpy(coded.codes.astype(np.float32)).mul_(step)


register(Integers())
