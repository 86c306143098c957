"""Floating-point weights: float32, float16 and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, Coding, register, straight_through

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Floats(Coding):
    tag = 0

    def choices(self) -> Sequence[Choice]:
        return tuple(_TYPES)

    def bits(self, choice: Choice) -> float:
        return {"float32": 32, "float16": 16, "bfloat16": 15.99}[str(choice)]

    def initial(self, weight: Tensor, choice: Choice) -> Tensor:
        return torch.empty(0)

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        return straight_through(weight.detach().to(_TYPES[str(choice)]).float(), weight)

    def layout(self, choice: Choice) -> tuple[int, int]:
        return {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}[str(choice)]

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        """The bit patterns as integers; -0.0 becomes 0.0."""
        value = (weight.detach().to(_TYPES[str(choice)]) + 0.0).contiguous().cpu()
        narrow = value.view(torch.int32 if choice == "float32" else torch.int16).numpy()
        return Coded(narrow.view(np.uint32 if choice == "float32" else np.uint16).astype(np.uint32).view(np.int32))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        if choice == "float32":
            return torch.from_numpy(coded.codes.copy()).view(torch.float32)
        narrow = coded.codes.astype(np.uint16).view(np.int16)
        return torch.from_numpy(narrow).view(_TYPES[str(choice)]).float()


register(Floats())
