"""Running a model once more from where it has changed.

Of a model in which one layer is changed, every module that had ended before that layer began says what it said. Of
these outputs those are kept that the rest of the model looks at, which one run under watch tells; they are handed back
instead of being computed again, and nothing of what led to them is computed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autocompress.nested import cloned, close, leaves, map_leaves
from autocompress.surgery import owners

KEPT_BYTES = 1 << 29
"""Of outputs that are kept; beyond it the largest go."""

Forward = Callable[..., Any]
Modules = frozenset[nn.Module]


@dataclass
class _Call:
    """The only time that a module ran. within: the modules that were running. uses: of its output, each the modules
    that were running then."""

    began: int
    ended: int
    within: Modules
    output: Any
    uses: Sequence[Modules] = ()


class Replay:
    """model: one that `can_replay`. run: runs it once and gives its output; where it does not run it, all of the model
    is always run."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        calls, running = defaultdict[nn.Module, list[_Call]](list), list[nn.Module]()
        uses, clock = defaultdict[int, list[tuple[int, Modules]]](list), itertools.count()

        def timed(module: nn.Module, forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                began, within = next(clock), frozenset(running)
                running.append(module)
                output = forward(*args, **kwargs)
                running.pop()
                calls[module].append(_Call(began, next(clock), within, output))
                return output

            return call

        class Watch(TorchFunctionMode):
            def __torch_function__(
                self, func: Forward, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
            ) -> Any:
                note((*args, kwargs or {}))
                return func(*args, **(kwargs or {}))

        def note(used: Any) -> None:
            for leaf in leaves(used):
                uses[id(leaf)].append((next(clock), frozenset(running)))

        with _instead(model.modules(), timed), Watch():
            output = run()
        note(output)
        self._began = {module: made[0].began for module, made in calls.items()}
        self._calls: dict[nn.Module, _Call] = {}
        for module, (call, *more) in calls.items():
            if not more and _is_plain(call.output):
                seen = [use for leaf in leaves(call.output) for use in uses[id(leaf)]]
                call.uses = [modules for at, modules in seen if at > call.ended]  # before, the id was another's
                self._calls[module] = call
        for call in self._calls.values():
            call.output = map_leaves(call.output, lambda leaf: leaf if leaf is None else leaf.new_empty(0))
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._said: dict[tuple[nn.Module, Hashable], Any] = {}

    @contextmanager
    def since(self, changed: Collection[nn.Module], batch: Hashable) -> Iterator[None]:
        """Until the block ends, the model runs from the first of `changed` on. batch: which one it runs with; outputs
        are kept under that name."""
        start = min((self.start(module) for module in changed), default=0)
        ended = {module for module, call in self._calls.items() if call.ended < start}
        runs, says = set[nn.Module](), dict[nn.Module, Any]()

        def is_live(modules: Modules) -> bool:
            return runs.issuperset(modules & ended)

        boundary = set[nn.Module]()
        for module in sorted(ended, key=lambda module: -self._calls[module].ended):
            call = self._calls[module]
            if not is_live(call.within):
                continue
            if not any(map(is_live, call.uses)):
                says[module] = call.output
                continue
            if not call.within & ended and any(not use & ended for use in call.uses):
                boundary.add(module)
            if (module, batch) in self._said:
                says[module] = self._said[module, batch]
            else:
                runs.add(module)

        def kept(module: nn.Module, forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                if module in says:
                    return cloned(says[module])
                output = forward(*args, **kwargs)
                self._said[module, batch] = cloned(output)
                return output

            return call

        try:
            with _instead(says.keys() | (runs & boundary), kept):
                yield
        finally:
            self._said = {key: said for key, said in self._said.items() if key[0] in boundary or key[1] != batch}
            while sum(map(_bytes, self._said.values())) > KEPT_BYTES:
                del self._said[max(self._said, key=lambda key: _bytes(self._said[key]))]

    def start(self, module: nn.Module) -> int:
        """When it began or, where its parent computes with its weights, that."""
        at: nn.Module | None = module
        while at is not None and at not in self._began:
            at = self._parents.get(at)
        return 0 if at is None else self._began[at]


def can_replay(model: nn.Module, batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> bool:
    """Whether all that modules of `model` tell each other is in their outputs: run from any that has weights, it says
    the same. batches: more than one, so that what is left behind by one is found by another. run: of the model and a
    batch, gives its output."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return False  # it does not call the forward of its parts
    try:
        return _says_the_same(model, batches, run)
    except Exception:  # whatever a model does where it is watched, or told less than it looks at
        return False


@torch.no_grad()
def _says_the_same(model: nn.Module, batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> bool:
    replay, plain = Replay(model, partial(run, model, batches[0])), [run(model, batch) for batch in batches]
    changed = sorted({module for places in owners(model).values() for module, _ in places}, key=replay.start)
    for module, at in itertools.product([*changed, *changed[-1:]], range(len(batches))):
        with replay.since([module], at):
            again = run(model, batches[at])
        if not close(plain[at], again):
            return False
    return True


def _is_plain(output: Any) -> bool:
    """Whether it is made of dense tensors."""
    return all(leaf is None or (isinstance(leaf, Tensor) and leaf.layout == torch.strided) for leaf in leaves(output))


def _bytes(output: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(output) if leaf is not None)


@contextmanager
def _instead(modules: Iterable[nn.Module], wrapped: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Each module runs what `wrapped` makes of its forward, until the block ends."""
    own = {module: vars(module).get("forward") for module in modules}
    try:
        for module in own:
            vars(module)["forward"] = wrapped(module, module.forward)
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
