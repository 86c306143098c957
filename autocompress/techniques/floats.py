"""Floating-point weights: float32, float16 and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, Coding, register

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
        return weight + (weight.detach().to(_TYPES[str(choice)]).float() - weight.detach())

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        """The bit patterns as unsigned integers."""
        value = (weight.detach() + 0.0).to(_TYPES[str(choice)]).contiguous().cpu()
        width = torch.int32 if choice == "float32" else torch.int16
        return Coded(value.view(width).numpy().view(np.uint32 if choice == "float32" else np.uint16))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        signed = coded.codes.view(np.int32 if choice == "float32" else np.int16)
        return torch.from_numpy(signed.copy()).view(_TYPES[str(choice)]).float()


register(Floats())
