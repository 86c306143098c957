"""Floating-point weights: float32, float16, bfloat16, float8, and bfloat16 with fewer bits of mantissa.

`float8-e4m3` and `float8-e5m2` are the formats of OCP and of Micikevicius et al., FP8 Formats for Deep
Learning, 2022; torch rounds to them.

`e8m5`, `e8m3` and `e8m2` keep the exponent of float32 (8 bits, of which entropy coding leaves two or three) and
round the mantissa to 5, 3 or 2 bits: the same relative precision for large and small values, which the
scales of norms need (the family of OCP's microscaling formats).

Not for tensors of integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, Coding, register, straight_through

_LAYOUTS = {
    "float32": (8, 23),
    "float16": (5, 10),
    "bfloat16": (8, 7),
    "e8m5": (8, 5),
    "e8m3": (8, 3),
    "e8m2": (8, 2),
    "float8-e4m3": (4, 3),
    "float8-e5m2": (5, 2),
}
_TORCH = {
    "float16": (torch.float16, torch.int16),
    "float8-e4m3": (torch.float8_e4m3fn, torch.uint8),
    "float8-e5m2": (torch.float8_e5m2, torch.uint8),
}
"""Formats that torch rounds to -> (torch's type, integers of its width)."""


class Floats(Coding):
    tag = 0

    def choices(self) -> Sequence[Choice]:
        return tuple(_LAYOUTS)

    def bits(self, choice: Choice) -> float:
        return 1.0 + sum(self.layout(choice))

    def layout(self, choice: Choice) -> tuple[int, int]:
        return _LAYOUTS[str(choice)]

    def parameters(self, choice: Choice, shape: tuple[int, ...]) -> int:
        return 0

    def initial(self, weight: Tensor, choice: Choice, clipping: str = "mse") -> Tensor:
        return torch.empty(0)

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        return straight_through(_rounded(weight, choice), weight)

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        """The bit patterns as integers."""
        rounded, width = _rounded(weight, choice).contiguous().cpu(), 1 + sum(self.layout(choice))
        if choice in _TORCH:
            dtype, integers = _TORCH[str(choice)]
            pattern = rounded.to(dtype).view(integers).int()
        else:
            pattern = rounded.view(torch.int32) >> _dropped(choice)
        if width < 32:  # without the sign's copies
            pattern &= (1 << width) - 1
        return Coded(pattern.numpy())

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        if choice in _TORCH:
            dtype, integers = _TORCH[str(choice)]
            return torch.from_numpy(coded.codes).to(integers).view(dtype).float()
        pattern = np.asarray(coded.codes << _dropped(choice))
        return torch.from_numpy(pattern).view(torch.float32)


def _dropped(choice: Choice) -> int:
    """Bits of float32's mantissa that a format of the same exponent lacks."""
    return 23 - _LAYOUTS[str(choice)][1]


def _rounded(weight: Tensor, choice: Choice) -> Tensor:
    """To the nearest value of the format, float32, on the device of `weight`; -0.0 becomes 0.0."""
    exact = weight.detach().float()
    if choice in _TORCH:
        dtype, _ = _TORCH[str(choice)]
        largest = torch.finfo(dtype).max
        return exact.clamp(-largest, largest).to(dtype).float() + 0.0
    drop = _dropped(choice)
    if drop:
        pattern = exact.contiguous().view(torch.int32)
        exact = (((pattern + (1 << (drop - 1))) >> drop) << drop).view(torch.float32)
    return exact + 0.0


register(Floats())
