"""Running a model once more from where it has changed.

Of a model in which one layer is changed, every module that had ended before that layer began gives the same outputs.
Those that the rest of the model looks at, found by watching one run, are kept and handed back instead of being computed
again, and nothing of what led to them is computed. Where the rest of the model computes with an output, but nothing
with what comes of that (as between layers of which the model itself takes the ReLU), only its shape is kept.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autocompress.model.hooks import Watch
from autocompress.model.surgery import owners
from autocompress.nested import cloned, close, leaves, map_leaves

KEPT_BYTES = 1 << 29
"""Of outputs that are kept; beyond it the largest go."""

Forward = Callable[..., Any]
Modules = frozenset[nn.Module]


@dataclass(frozen=True)
class _Operation:
    """A call of one of torch's functions. within: the modules that were running. reads, makes: places in memory of the
    tensors that it was given and gave; where it gave none, what it read may go anywhere."""

    within: Modules
    reads: frozenset[int]
    makes: frozenset[int]


@dataclass(frozen=True)
class _Call:
    """The only time that a module ran. within: the modules that were running. gives: as `_Operation.makes`.
    stand_in: its output without numbers."""

    module: nn.Module
    ended: int
    within: Modules
    gives: frozenset[int]
    stand_in: Any

    @classmethod
    def of(cls, module: nn.Module, ended: int, within: Modules, output: Any) -> _Call:
        empty = map_leaves(output, lambda leaf: leaf if leaf is None else leaf.new_empty(0))
        return cls(module, ended, within, _places(output), empty)


class _Output(NamedTuple):
    """Of a module, of one batch. whole: with its numbers, and not only its shape."""

    output: Any
    whole: bool


class Replay:
    """model: one that `can_replay`. run: runs it once and gives its output; where it does not run it, all of the model
    is always run."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        running, clock, calls = list[nn.Module](), itertools.count(), Counter[nn.Module]()
        self._began: dict[nn.Module, int] = {}
        events: list[_Operation | tuple[nn.Module, int, Modules, Any]] = []

        def timed(module: nn.Module, forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[module] += 1
                self._began.setdefault(module, next(clock))
                within = frozenset(running)
                running.append(module)
                output = forward(*args, **kwargs)
                running.pop()
                events.append((module, next(clock), within, output))
                return output

            return call

        def see(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            events.append(_Operation(frozenset(running), _places((*args, kwargs)), _places(output)))
            made.append(output)

        made: list[Any] = []  # kept as long as the model runs: no place becomes another's
        with _instead(model.modules(), timed), Watch(see):
            output = run()
        self._gives = _places(output)
        self._events: list[_Operation | _Call] = []
        for event in reversed(events):
            if isinstance(event, _Operation):
                self._events.append(event)
            elif calls[event[0]] == 1 and _is_plain(event[3]):
                self._events.append(_Call.of(*event))
        self._ended = {event.module: event.ended for event in self._events if isinstance(event, _Call)}
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._outputs: dict[tuple[nn.Module, Hashable], _Output] = {}

    @contextmanager
    def since(self, changed: Collection[nn.Module], batch: Hashable) -> Iterator[None]:
        """Until the block ends, the model runs from the first of `changed` on. batch: which one it runs with; outputs
        are kept under that name."""
        start = min((self.start(module) for module in changed), default=0)
        ended = {module for module, at in self._ended.items() if at < start}
        runs, reused = set[nn.Module](), dict[nn.Module, _Output]()
        keeps = {call.module: needed for call, needed in self._looked_at(ended, set()) if needed is not None}
        for call, needed in self._looked_at(ended, runs):
            known = _Output(call.stand_in, whole=False) if needed is None else self._outputs.get((call.module, batch))
            if known is None or (needed and not known.whole):
                runs.add(call.module)
            else:
                reused[call.module] = known

        def kept(module: nn.Module, forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                if module in reused:
                    output, whole = reused[module]
                    return cloned(output) if whole else map_leaves(output, _filled)
                output, whole = forward(*args, **kwargs), keeps[module]
                self._outputs[module, batch] = _Output(cloned(output) if whole else map_leaves(output, _hollow), whole)
                return output

            return call

        try:
            with _instead(reused.keys() | (runs & keeps.keys()), kept):
                yield
        finally:
            self._outputs = {key: known for key, known in self._outputs.items() if key[0] in keeps or key[1] != batch}
            while sum(map(_bytes, self._outputs.values())) > KEPT_BYTES:
                del self._outputs[max(self._outputs, key=lambda key: _bytes(self._outputs[key]))]

    def _looked_at(self, ended: Set[nn.Module], runs: Set[nn.Module]) -> Iterator[tuple[_Call, bool | None]]:
        """The calls of modules that had `ended`, the last first, and whether their numbers are needed; None if not even
        their shapes are. runs: those that run all the same, with what is within."""
        wanted, touched = set(self._gives), set[int]()
        for event in self._events:
            if not runs >= event.within & ended:
                continue
            if isinstance(event, _Operation):
                needed = not event.makes or not wanted.isdisjoint(event.makes)
                (wanted if needed else touched).update(event.reads)
            elif event.module in ended:
                needed = not wanted.isdisjoint(event.gives)
                yield event, needed if needed or not touched.isdisjoint(event.gives) else None

    def start(self, module: nn.Module) -> int:
        """When it began or, where its parent computes with its weights, that."""
        at: nn.Module | None = module
        while at is not None and at not in self._began:
            at = self._parents.get(at)
        return 0 if at is None else self._began[at]


def can_replay(model: nn.Module, batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> bool:
    """Whether modules of `model` hand each other nothing but their outputs: run from any that has weights, it gives the
    same. batches: more than one, so that what is left behind by one is found by another. run: of the model and a
    batch, gives its output."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return False  # it does not call the forward of its parts
    try:
        return _runs_the_same(model, batches, run)
    except Exception:  # whatever a model does where it is watched, or given less than it looks at
        return False


@torch.no_grad()
def _runs_the_same(model: nn.Module, batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> bool:
    replay, plain = Replay(model, partial(run, model, batches[0])), [run(model, batch) for batch in batches]
    changed = sorted({module for places in owners(model).values() for module, _ in places}, key=replay.start)
    for module, at in itertools.product([*changed, *changed[-1:]], range(len(batches))):
        with replay.since([module], at):
            again = run(model, batches[at])
        if not close(plain[at], again):
            return False
    return True


def _places(value: Any) -> frozenset[int]:
    """Of its tensors, the same for views of one; of those that are not dense, their ids."""
    return frozenset(
        leaf.untyped_storage().data_ptr() if leaf.layout == torch.strided else id(leaf)
        for leaf in leaves(value)
        if isinstance(leaf, Tensor)
    )


def _hollow(leaf: Tensor | None) -> Tensor | None:
    """Zeros of its shape, which take no memory."""
    return None if leaf is None else leaf.new_zeros(()).expand(leaf.shape)


def _filled(hollow: Tensor | None) -> Tensor | None:
    return None if hollow is None else hollow.new_zeros(hollow.shape)


def _is_plain(output: Any) -> bool:
    """Whether it is made of dense tensors."""
    return all(leaf is None or (isinstance(leaf, Tensor) and leaf.layout == torch.strided) for leaf in leaves(output))


def _bytes(known: _Output) -> int:
    return sum(leaf.untyped_storage().nbytes() for leaf in leaves(known.output) if leaf is not None)


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
