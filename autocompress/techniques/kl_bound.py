"""KL-constrained fine-tuning: distillation with a bound on how far the outputs may drift.

The divergence from the original's outputs is held below the bound by a Lagrange multiplier, which rises while
the bound is broken and falls while it is kept (dual ascent; Bertsekas, 1982).

Not for models whose outputs are not float tensors (or tuples, lists or dicts of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from autocompress.recipe import Choice
from autocompress.techniques.base import Term, TrainingTechnique, number_in, register

_RATE, _LARGEST = 0.1, 20.0


class KLBound(TrainingTechnique):
    name = "kl_bound"
    default = 0.0
    about = "bound on the divergence of the outputs from the original's while fine-tuning, in nats; 0 sets none"

    def examples(self) -> Sequence[Choice]:
        return (0.0, 0.01)

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.0, 10.0, "give a bound in nats")

    def term(self, choice: Choice, activations: Sequence[nn.Module]) -> Term | None:
        return None if choice == self.default else _Constraint(float(choice))


class _Constraint(Term):
    def __init__(self, bound: float) -> None:
        self.bound, self.multiplier = bound, 0.0

    def loss(self, divergence: Tensor) -> Tensor:
        excess = divergence - self.bound
        step = float(excess.detach().clamp(-self.bound, self.bound)) / self.bound
        self.multiplier = min(max(self.multiplier + _RATE * step, 0.0), _LARGEST)
        return self.multiplier * excess


register(KLBound())
