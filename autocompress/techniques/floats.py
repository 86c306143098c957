"""Floating-point weights: float32, float16, bfloat16, and bfloat16 with fewer bits of mantissa.

`e8m5`, `e8m3` and `e8m2` keep the exponent of float32 (8 bits, of which entropy coding leaves two or three) and
round the mantissa to 5, 3 or 2 bits: the same relative precision for large and small values, which the
scales of norms need (the family of OCP's microscaling formats).
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
}


class Floats(Coding):
    tag = 0

    def choices(self) -> Sequence[Choice]:
        return tuple(_LAYOUTS)

    def bits(self, choice: Choice) -> float:
        return 1.0 + sum(self.layout(choice))

    def layout(self, choice: Choice) -> tuple[int, int]:
        return _LAYOUTS[str(choice)]

    def parameters(self, choice: Choice) -> int:
        return 0

    def initial(self, weight: Tensor, choice: Choice) -> Tensor:
        return torch.empty(0)

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        return straight_through(self.decode(self.encode(weight, choice, parameters), choice).to(weight.device), weight)

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        """The bit patterns as integers, rounded to nearest; -0.0 becomes 0.0."""
        if choice == "float16":
            half = (weight.detach().clamp(-65504, 65504).to(torch.float16) + 0.0).contiguous().cpu()
            return Coded(half.view(torch.int16).numpy().view(np.uint16).astype(np.int32))
        pattern = (weight.detach().float() + 0.0).contiguous().cpu().view(torch.int32).numpy().view(np.uint32)
        drop = 23 - self.layout(choice)[1]
        if drop:
            pattern = (pattern + np.uint32(1 << (drop - 1))) >> np.uint32(drop)
            pattern = np.where(pattern << np.uint32(drop) == 1 << 31, np.uint32(0), pattern)
        return Coded(np.asarray(pattern).view(np.int32))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        if choice == "float16":
            return torch.from_numpy(coded.codes.astype(np.uint16).view(np.int16)).view(torch.float16).float()
        pattern = np.asarray(coded.codes << (23 - self.layout(choice)[1]))
        return torch.from_numpy(pattern).view(torch.float32)


register(Floats())
