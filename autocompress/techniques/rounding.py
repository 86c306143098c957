"""Rate-distortion optimised rounding: the cheaper of the two neighbours, where the loss does not feel it.

After fine-tuning each weight lies between two codes. Nearest rounding takes the closer one; this takes
the one of least loss + price x bits, with the loss from a diagonal second-order estimate (optimal brain
damage, LeCun et al., 1990; rate-distortion optimised quantisation as in DeepCABAC, Wiedemann et al., 2019).

Not for float formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import IntegerWeights, TrainingTechnique, number_in, register


class Rounding(TrainingTechnique):
    name = "rounding"
    default = 0.0
    about = "price of a bit when weights are rounded at the end; 0 rounds to the nearest"

    def examples(self) -> Sequence[Choice]:
        return (0.0, 0.1)

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.0, 100.0, "give a price")

    def settle(self, choice: Choice, weights: IntegerWeights) -> Tensor:
        below = weights.scaled.floor()
        low = self._cost(float(choice), weights, below)
        high = self._cost(float(choice), weights, below + 1)
        return torch.where(high < low, below + 1, below)

    def _cost(self, price: float, weights: IntegerWeights, code: Tensor) -> Tensor:
        magnitude = code.abs().long().clamp_max(len(weights.bits) - 1)
        return weights.sensitivity * (weights.scaled - code).square() + price * weights.bits[magnitude]


register(Rounding())
