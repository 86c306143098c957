"""Activation choice: another function in place of the trained one.

Bounded functions (hardtanh here clips to [-1, 1]; relu6 to [0, 6]) keep activations in a range that
few bits can hold (Krizhevsky, 2010; Choi et al., PACT, 2018). Other files of this folder `offer` more.

Not for functional calls (only activations that are modules), and modules with parameters such as PReLU.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.model.anatomy import Anatomy
from autocompress.model.replacement import Elementwise
from autocompress.recipe import Choice
from autocompress.task import Calibration
from autocompress.techniques.base import StructureTechnique, register

_KEEP = "keep"


class FittedActivation(Elementwise, ABC):
    """An activation whose parameters are set from what it stands in for, and trained further."""

    @abstractmethod
    def fit(self, old: nn.Module, inputs: Tensor) -> None:
        """Set the parameters so that this module does what `old` does on `inputs`, float32 [n]."""


_OFFERS: dict[str, tuple[re.Pattern[str], Callable[[str], nn.Module]]] = {}


def offer(example: str, pattern: str, make: Callable[[str], nn.Module]) -> None:
    """Offer the choices that match `pattern`; `make(choice)` builds the module, not yet fitted.

    example: how people read of it, like `piecewise-8`. `make` raises ValueError for numbers that
    make no sense.
    """
    _OFFERS[example] = (re.compile(pattern), make)


def _make(choice: str) -> nn.Module:
    for pattern, make in _OFFERS.values():
        if pattern.fullmatch(choice):
            return make(choice)
    raise ValueError(choice)


for _name, _kind in (
    ("relu", nn.ReLU),
    ("relu6", nn.ReLU6),
    ("hardtanh", nn.Hardtanh),
    ("hardswish", nn.Hardswish),
    ("leaky_relu", nn.LeakyReLU),
):
    offer(_name, _name, lambda choice, kind=_kind: kind())  # type: ignore[misc]


class Activation(StructureTechnique):
    name = "activation"
    default = _KEEP

    @property
    def about(self) -> str:
        return f"function of an activation: {_KEEP}, or " + ", ".join(_OFFERS)

    def examples(self) -> Sequence[Choice]:
        return (_KEEP, *_OFFERS)

    def file_of(self, example: Choice) -> str:
        return __name__ if example == _KEEP else _OFFERS[str(example)][1].__module__

    def parse(self, raw: Any) -> Choice:
        try:
            if raw != _KEEP:
                _make(str(raw))
        except ValueError:
            raise SpaceError(f"choice {raw!r} does not exist; choose from {_KEEP}, {', '.join(_OFFERS)}") from None
        return str(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return list(anatomy.activations)

    def apply(
        self,
        model: nn.Module,
        chosen: Mapping[str, Choice],
        run: Calibration,
        options: Mapping[str, Choice] | None = None,
    ) -> nn.Module:
        before = {name: model.get_submodule(name) for name in chosen}
        self.restore(model, chosen)
        fitted = {
            name: module
            for name in chosen
            if isinstance(module := model.get_submodule(name), FittedActivation) and module is not before[name]
        }
        if not fitted:
            return model
        for name in fitted:
            model.set_submodule(name, before[name])
        inputs = _inputs(model, list(fitted), run)
        for name, module in fitted.items():
            if name in inputs:
                with torch.no_grad():
                    module.to(inputs[name].device).fit(before[name], inputs[name])
            model.set_submodule(name, module)
        return model

    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> nn.Module:
        for name, choice in chosen.items():
            old = model.get_submodule(name)
            if choice == self.default or getattr(old, "choice", None) == choice:
                continue
            new = _make(str(choice)).train(old.training)
            new.choice = str(choice)  # type: ignore[assignment]
            model.set_submodule(name, new)
        return model


def _inputs(model: nn.Module, names: Sequence[str], run: Calibration) -> dict[str, Tensor]:
    """What flows into each of these modules on the calibration batch, float32 [n]."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach().float().flatten()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


register(Activation())
