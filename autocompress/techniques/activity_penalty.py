"""Price of activity: outputs of activations are pulled towards zero while fine-tuning.

`l1-0.01`: 0.01 times the mean magnitude, summed over the activations (Georgiadis, CVPR 2019); `l2-0.01`: the
mean square. How sparse the activations have become is measured for every trial (`activation_sparsity` in its
metrics) and printed by `autocompress evaluate`.

Not for models without activation modules: there it has nothing to price.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.model.hooks import forward_hooks
from autocompress.recipe import Choice
from autocompress.techniques.base import Term, TrainingTechnique, register

_PATTERN = re.compile(r"l([12])-(\d*\.?\d+)")


class ActivityPenalty(TrainingTechnique):
    name = "activity_penalty"
    default = "none"
    about = "price of the activations' outputs while fine-tuning: none, l1-0.01 or l2-0.01"

    def examples(self) -> Sequence[Choice]:
        return ("none", "l1-0.01", "l2-0.01")

    def parse(self, raw: Any) -> Choice:
        if raw != self.default and not _PATTERN.fullmatch(str(raw)):
            raise SpaceError(f"choice {raw!r} does not exist; give none, l1-0.01 or l2-0.01 with any price")
        return str(raw)

    def term(self, choice: Choice, activations: Sequence[nn.Module]) -> Term | None:
        match = _PATTERN.fullmatch(str(choice))
        return _Activity(int(match[1]), float(match[2]), activations) if match else None


class _Activity(Term):
    def __init__(self, power: int, price: float, activations: Sequence[nn.Module]) -> None:
        self.power, self.price, self.activations = power, price, activations
        self.seen: list[Tensor] = []

    def __enter__(self) -> None:
        self.seen = []
        self.watching = forward_hooks((module, self._watch) for module in self.activations)
        self.watching.__enter__()

    def __exit__(self, *error: object) -> None:
        self.watching.__exit__(None, None, None)

    def _watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.float().abs().pow(self.power).mean())

    def loss(self, divergence: Tensor) -> Tensor:
        return self.price * (torch.stack(self.seen).sum() if self.seen else divergence.new_zeros(()))


register(ActivityPenalty())
