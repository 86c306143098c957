"""Exchange of sparsity between layers, at equal bytes, while fine-tuning.

`magnitude`: whenever masks are drawn, all pruned layers compete with one threshold and the recipe sets only how
many bits they have together (dynamic sparse reparameterisation, Mostafa and Wang, ICML 2019). Weights are
compared by their layer-adaptive score (Lee et al., LAMP, ICLR 2021) per bit, so that layers of other scale
and of other bit width are alike. Bits are those of a weight before entropy coding.

Not for layers pruned by pattern or by threshold, which have no share to exchange; fewer than two pruned layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import SparseLayer, TrainingTechnique, register


class Exchange(TrainingTechnique):
    name = "exchange"
    default = "none"
    about = "whether layers exchange sparsity while fine-tuning, at equal bytes: none, magnitude"

    def examples(self) -> Sequence[Choice]:
        return ("none", "magnitude")

    def parse(self, raw: Any) -> Choice:
        if raw not in ("none", "magnitude"):
            raise SpaceError(f"choice {raw!r} does not exist; choose from none, magnitude")
        return str(raw)

    def exchanged(self, choice: Choice, layers: Sequence[SparseLayer]) -> list[float]:
        if choice == self.default or len(layers) < 2:
            return super().exchanged(choice, layers)
        scores = torch.cat([_lamp(layer.weight) / layer.bits for layer in layers])
        owner = torch.cat(
            [torch.full((layer.weight.numel(),), i, device=scores.device) for i, layer in enumerate(layers)]
        )
        bits = torch.tensor([layer.bits for layer in layers], dtype=torch.float64, device=scores.device)
        order = scores.argsort(descending=True, stable=True)
        spent = bits[owner[order]].cumsum(0)
        budget = sum(layer.bits * round((1 - layer.zeros) * layer.weight.numel()) for layer in layers)
        stay = torch.bincount(owner[order][spent <= budget], minlength=len(layers)).tolist()
        return [1 - max(count, 1) / layer.weight.numel() for count, layer in zip(stay, layers, strict=True)]


def _lamp(weight: Tensor) -> Tensor:
    """float32 [n]: each squared weight over the sum of those not smaller."""
    squares, order = weight.detach().float().flatten().square().sort()
    rest = squares.double().flip(0).cumsum(0).flip(0).clamp_min(1e-30)
    return torch.empty_like(squares).scatter_(0, order, (squares / rest).float())


register(Exchange())
