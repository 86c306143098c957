"""Activation choice: another elementwise function in place of the trained one.

Bounded functions (hardtanh here clips to [-1, 1]; relu6 to [0, 6]) keep activations in a range that
few bits can hold (Krizhevsky, 2010; Choi et al., PACT, 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from autocompress.anatomy import Anatomy, Run
from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import StructureTechnique, register

FUNCTIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
}


class Activation(StructureTechnique):
    name = "activation"
    default = "keep"
    about = "function of an activation: keep, or " + ", ".join(FUNCTIONS)

    def parse(self, raw: Any) -> Choice:
        if raw not in ("keep", *FUNCTIONS):
            raise SpaceError(f"choice {raw!r} does not exist; choose from keep, {', '.join(FUNCTIONS)}")
        return str(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return list(anatomy.activations)

    def apply(self, model: nn.Module, chosen: Mapping[str, Choice], run: Run) -> None:
        self.restore(model, chosen)

    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> None:
        for name, choice in chosen.items():
            old = model.get_submodule(name)
            if choice != self.default and type(old) is not FUNCTIONS[str(choice)]:
                model.set_submodule(name, FUNCTIONS[str(choice)]().train(old.training))


register(Activation())
