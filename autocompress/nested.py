"""Tuples, lists, mappings, data classes, name spaces and distributions, of which batches and outputs are made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Of what is made of parts; None of a leaf."""
    if isinstance(value, Tensor):  # as most are: no need to ask on
        return None
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, SimpleNamespace):
        return vars(value)
    if isinstance(value, Distribution):
        names = {*value.arg_constraints}
        return {name: part for name, part in vars(value).items() if name in names or isinstance(part, Distribution)}
    if is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "to"):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def leaves(value: Any) -> Iterator[Any]:
    """Whatever is in the parts of a batch or an output, in their order."""
    parts = _parts(value)
    if parts is None:
        yield value
    else:
        for part in parts.values():
            yield from leaves(part)


def close(one: Any, other: Any) -> bool:
    """Whether two outputs have the same floats, but for how they were rounded."""
    pairs = [
        [leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for value in (one, other)
    ]
    return all(
        torch.equal(a, b) or torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in zip(*pairs, strict=True)
    )


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with its leaves changed; what is made of parts keeps its type."""
    parts = _parts(value)
    if parts is None:
        return change(value)
    items = {name: map_leaves(part, change) for name, part in parts.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(*items.values()) if hasattr(value, "_fields") else type(value)(items.values())
    changed = copy.copy(value)
    for name, item in items.items():
        if isinstance(changed, MutableMapping):
            changed[name] = item
        else:
            object.__setattr__(changed, name, item)  # frozen ones, too
    return changed


def cloned(value: Any) -> Any:
    """`value` with its tensors cloned, for what comes next may compute in place; what was one tensor stays one."""
    copies = {id(leaf): leaf.clone() for leaf in leaves(value) if isinstance(leaf, Tensor)}
    return map_leaves(value, lambda leaf: copies.get(id(leaf), leaf))
