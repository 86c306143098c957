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
        return straight_through(self.decode(self.encode(weight, choice, parameters), choice).to(weight.device), weight)

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        """The bit patterns as integers, rounded to nearest; -0.0 becomes 0.0."""
        if choice in _TORCH:
            dtype, integers = _TORCH[str(choice)]
            largest = torch.finfo(dtype).max
            rounded = weight.detach().float().clamp(-largest, largest).to(dtype)
            pattern = rounded.contiguous().cpu().view(integers).numpy().astype(np.int32)
            pattern &= (1 << (1 + sum(self.layout(choice)))) - 1
            negative_zero = 1 << sum(self.layout(choice))
            return Coded(np.where(pattern == negative_zero, np.int32(0), pattern))
        pattern = (weight.detach().float() + 0.0).contiguous().cpu().view(torch.int32).numpy().view(np.uint32)
        drop = 23 - self.layout(choice)[1]
        if drop:
            pattern = (pattern + np.uint32(1 << (drop - 1))) >> np.uint32(drop)
            pattern = np.where(pattern << np.uint32(drop) == 1 << 31, np.uint32(0), pattern)
        return Coded(np.asarray(pattern).view(np.int32))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        if choice in _TORCH:
            dtype, integers = _TORCH[str(choice)]
            return torch.from_numpy(coded.codes).to(integers).view(dtype).float()
        pattern = np.asarray(coded.codes << (23 - self.layout(choice)[1]))
        return torch.from_numpy(pattern).view(torch.float32)


register(Floats())
