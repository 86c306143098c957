"""Tuples, lists and mappings of whatever batches and outputs are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """Whatever is in the tuples, lists and mappings of a batch or an output, in their order."""
    if isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(item)
    else:
        yield value


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
    """`value` with its leaves changed; tuples, lists and mappings keep their types."""
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_leaves(item, change)
        return changed
    if isinstance(value, (tuple, list)):
        items = [map_leaves(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)


def cloned(value: Any) -> Any:
    """`value` with its tensors cloned, for what comes next may compute in place; what was one tensor stays one."""
    copies = {id(leaf): leaf.clone() for leaf in leaves(value) if isinstance(leaf, Tensor)}
    return map_leaves(value, lambda leaf: copies.get(id(leaf), leaf))
