"""Watching modules while a model runs, and leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Hook = Callable[..., Any]
"""(module, inputs, output), or (module, inputs, named inputs, output), -> None, or what is to stand for the output."""


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Hook]], with_kwargs: bool = False) -> Iterator[None]:
    """Each hook is called after its module ran, until the block ends."""
    handles = [module.register_forward_hook(hook, with_kwargs=with_kwargs) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
