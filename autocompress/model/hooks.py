"""Watching modules, and torch's functions, while a model runs, and leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

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


class Watch(TorchFunctionMode):
    """`see(function, arguments, named arguments, output)` is called after each of torch's functions, until the block
    ends."""

    def __init__(self, see: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._see(func, args, kwargs or {}, output)
        return output
