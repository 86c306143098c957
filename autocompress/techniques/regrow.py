"""Prune and regrow: while fine-tuning, the smallest weights that stay make room for pruned ones.

`gradient`: those grow back whose gradient is largest (Evci et al., RigL, ICML 2020). `random`: any (Mocanu
et al., SET, 2018). The exchanged share begins at 30% and falls to nothing with a half cosine, as in RigL.
`none`: masks follow the magnitudes of all weights, the pruned ones too.

Not for layers pruned by pattern or by threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, register

_CHOICES = ("none", "gradient", "random")


class Regrow(TrainingTechnique):
    name = "regrow"
    default = "none"
    about = "which pruned weights grow back while fine-tuning, in place of the smallest that stay"

    def examples(self) -> Sequence[Choice]:
        return _CHOICES

    def parse(self, raw: Any) -> Choice:
        if raw not in _CHOICES:
            raise SpaceError(f"choice {raw!r} does not exist; choose from {', '.join(_CHOICES)}")
        return str(raw)

    def regrown(self, choice: Choice, mask: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
        count = min(int(share * int(mask.sum())), int((~mask).sum()))
        if choice == self.default or not count:
            return mask
        stay, pruned = mask.flatten(), ~mask.flatten()
        worth = gradient.flatten().abs() if choice == "gradient" else torch.rand_like(gradient.flatten())
        drop = weight.flatten().abs().masked_fill(pruned, torch.inf).topk(count, largest=False, sorted=False).indices
        grow = worth.masked_fill(stay, -1.0).topk(count, sorted=False).indices
        exchanged = stay.clone()
        exchanged[drop], exchanged[grow] = False, True
        return exchanged.view_as(mask)


register(Regrow())
