"""Price of bits: while fine-tuning, the logarithm of the estimated rate is part of the loss.

So half the bits are worth the same at any size: a price that suits a first step suits the last one too.
Losses without classes are not in nats: theirs counts in shares of what the mean output loses.
Rate-aware training makes files 2 to 3 times smaller with the same coder (Wiedemann et al., DeepCABAC,
2019; Oktay et al., Scalable Model Compression, ICLR 2020). Biases that are not
worth their bits become zero (`autocompress/trial/biases.py`). Without training weights are rounded by it
(`autocompress/trial/priced_rounding.py`; Behdin et al., QuantEase, 2023; Conzelmann and Bamler, CERWU, 2025).

Not for float formats, whose rate the estimate takes as constant; without training only for integers of equal steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, number_in, register


class RatePenalty(TrainingTechnique):
    name = "rate_penalty"
    default = 0.0
    about = "price of bits: nats of loss that half the bits are worth; more makes smaller files"

    def examples(self) -> Sequence[Choice]:
        return (0.0, 0.25, 1.0)

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.0, 100.0, "give a price")

    def penalty(self, choice: Choice) -> float:
        return float(choice)


register(RatePenalty())
