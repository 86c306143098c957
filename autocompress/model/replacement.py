"""Modules that stand in for a module of the original model and are made of parts.

A factorised layer is two layers, a stack is several copies of a block. What is asked of a layer of the
original is asked of every part that came of it, so each part knows whose part it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from autocompress.model.surgery import owners


class Replacement(nn.Module):
    """Stands in for one module of the original; its children are parts of that module.

    hidden: children whose output channels are no channels of the original. choice: of the recipe that made it.
    """

    choice: str = ""
    hidden: ClassVar[frozenset[str]] = frozenset()


class Elementwise(nn.Module):
    """What a technique does to the values of one tensor; each stays in its place, and so do channels."""


class Dropped(Replacement):
    """Nothing in place of a module: what comes in goes out."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def origins(model: nn.Module) -> dict[str, str]:
    """Name of each module of `model` -> name of the original's module that it is, or is a part of."""
    return {name: origin for _, name, origin, _ in _walk(model, "", "", False)}


def original_names(model: nn.Module) -> dict[str, str]:
    """First name of each tensor of `model` -> the name of the original's tensor that it is, or is a part of."""
    known = origins(model)
    return {key: _join(known[key.rpartition(".")[0]], key.rpartition(".")[2]) for key in owners(model)}


def channel_makers(model: nn.Module) -> dict[int, str]:
    """id of each module -> the original's module whose output channels it makes; its own name if none."""
    return {id(module): name if inner else origin for module, name, origin, inner in _walk(model, "", "", False)}


def _walk(module: nn.Module, name: str, origin: str, inner: bool) -> Iterator[tuple[nn.Module, str, str, bool]]:
    yield module, name, origin, inner
    hidden = module.hidden if isinstance(module, Replacement) else frozenset[str]()
    for child, submodule in module.named_children():
        below = origin if isinstance(module, Replacement) else _join(origin, child)
        yield from _walk(submodule, _join(name, child), below, inner or child in hidden)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def replaced(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """`model` with `new` in place of the module `name`; with an empty name `new` itself."""
    new.train(model.training)
    if not name:
        return new
    model.set_submodule(name, new)
    return model
