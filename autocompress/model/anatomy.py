"""What we read off a model: layers, channel groups, activations. No model class is special-cased."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import in_words
from autocompress.model.channel_graph import ChannelGraph, Run
from autocompress.model.hooks import Hook, forward_hooks
from autocompress.model.reparametrization import copied
from autocompress.model.replacement import Dropped, Replacement
from autocompress.model.surgery import as_real, owners, tensors
from autocompress.nested import cloned, close, leaves

MIN_WEIGHTS = 16
"""Tensors with fewer weights are not worth a dimension of their own."""


Memberships = tuple[tuple[str, float], ...]
"""(channel group, its part of a dimension of a tensor), for each dimension that it changes."""


@dataclass(frozen=True)
class Layer:
    """One weight tensor of two or more dimensions.

    name: `conv1` for `conv1.weight`, the whole parameter name for others (`lstm.weight_ih_l0`).
    parameter: its first name in the model. shape: as stored, complex weights as pairs. kind: class of the
    layer that holds it. groups: channel groups that change its shape (one may be named twice), each with its
    part of the dimension that it changes: 1 but for concatenated channels. grid: sizes of what a row of weights
    lies on: the kernel of a convolution, the image or the signal that a linear layer reads; () if it is in no order.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    kind: str
    groups: Memberships = ()
    grid: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, named by the first layer that makes them."""

    name: str
    channels: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A module that another can stand in for: it runs once, from one tensor to one tensor.

    name: "" is the whole model. kind: its class, "" if it is none of torch's. layers: those inside. inner: channel
    groups that no one outside sees. droppable: the model runs without it, however its channels are pruned. repeatable:
    it gives the same again. grouped: it is a convolution of several groups.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    inner: tuple[str, ...] = ()
    droppable: bool = False
    repeatable: bool = True
    grouped: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that techniques can act on.

    blocks: modules that can be replaced, the whole model first. vectors: (elements, channel groups) of each
    remaining tensor (biases, norms).
    inputs: layers whose first input is a float tensor: there activations can be quantised.
    activations: name -> class of the activation modules.
    left_alone: what could not be analysed -> why, for the user to read.
    """

    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    activations: dict[str, str]
    inputs: tuple[str, ...]
    vectors: tuple[tuple[int, Memberships], ...]
    blocks: tuple[Block, ...] = ()
    left_alone: dict[str, str] = field(default_factory=dict)

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)


def layer_name(parameter: str) -> str:
    return parameter.removesuffix(".weight") or parameter


def read_anatomy(model: nn.Module, run: Run) -> Anatomy:
    """Read the parts of `model`; `run(model)` runs it on one batch. The model is not changed."""
    model = copied(model).eval()
    left_alone: dict[str, str] = {}
    groups, touched, steady = _channel_groups(model, run, left_alone)
    layers = []
    vectors = []
    for key, places in owners(model).items():
        tensor = getattr(*places[0])
        if isinstance(tensor, nn.Parameter) and _is_matrix(tensor, places[0][1]):
            kind = type(places[0][0]).__name__
            shape = tuple(as_real(tensor).shape)
            layers.append(Layer(layer_name(key), key, shape, kind, tuple(touched.get(key, ()))))
        elif as_real(tensor).is_floating_point():
            vectors.append((as_real(tensor).numel(), tuple(touched.get(key, ()))))
    inputs, activations = _seen_in_forward(model, run, {layer.parameter for layer in layers}, left_alone)
    blocks = tuple(_blocks(model, run, layers, groups, steady))
    return Anatomy(tuple(layers), groups, activations, inputs, tuple(vectors), blocks, left_alone)


def _is_matrix(tensor: Tensor, attribute: str) -> bool:
    """Whether it is worth choices of its own. Scales of channels and tokens of transformers are vectors, whatever their
    number of dimensions, but not what a layer calls its weight."""
    line = tensor.numel() == max(tensor.shape, default=1) and "weight" not in attribute
    return tensor.ndim >= 2 and as_real(tensor).is_floating_point() and tensor.numel() >= MIN_WEIGHTS and not line


def _seen_in_forward(
    model: nn.Module, run: Run, weights: set[str], left_alone: dict[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Layers fed with float tensors and activation modules, of those that really run."""
    inputs: dict[str, None] = {}
    activations: dict[str, str] = {}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if any(isinstance(x, Tensor) and _is_mapped(x) for x in args):
                left_alone.setdefault(name, "its activations cannot be measured inside torch.vmap")
            elif name in elementwise:
                activations[name] = type(module).__name__
            elif args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                inputs[name] = None

        return hook

    elementwise = {name for name, module in model.named_modules() if is_activation(module)}
    watched = [
        (module, watch(name))
        for name, module in model.named_modules()
        if name in elementwise or f"{name}.weight" in weights
    ]
    with forward_hooks(watched), torch.no_grad():
        run(model)
    order = [name for name, _ in model.named_modules()]
    return tuple(sorted(inputs, key=order.index)), dict(sorted(activations.items(), key=lambda a: order.index(a[0])))


def _is_mapped(x: Tensor) -> bool:
    """Whether it is one of many inside `torch.vmap`, where nothing can be counted or measured."""
    mapped: bool = torch._C._functorch.is_batchedtensor(x)
    return mapped


@torch.no_grad()
def is_activation(module: nn.Module) -> bool:
    """Whether it is an elementwise function that is not linear and has no parameters, whatever its class: any such may
    stand in for any other."""
    if next(module.children(), None) is not None or tensors(module):
        return False
    x = torch.linspace(-4, 4, 64)
    try:
        y, some, twice, minus = (module.forward(z.clone()) for z in (x, x[16:48].flip(0), 2 * x, -x))
        alone = torch.allclose(y[16:48].flip(0), some, equal_nan=True)
        linear = torch.allclose(twice, 2 * y, equal_nan=True) and torch.allclose(minus, -y, equal_nan=True)
    except Exception:  # it does something else than that
        return False
    return alone and not linear and y.shape == x.shape


# ------------------------------------------------------------------ blocks


def _blocks(
    model: nn.Module, run: Run, layers: list[Layer], groups: tuple[ChannelGroup, ...], steady: set[str]
) -> Iterator[Block]:
    """Modules with layers inside; those that share a weight with another are none."""
    expected, modules = _tensor_to_tensor(model, run)
    tied = [{id(module) for module, _ in places} for places in owners(model).values() if len(places) > 1]
    inside = {name: within for name in modules if (within := _layers_inside(model, name, layers, tied))}
    parts = {name: model.get_submodule(name) for name in inside}
    whole = _replaceable(model, {name: _Wrapped(part) for name, part in parts.items() if name}, run, expected)
    droppable = _replaceable(model, {name: Dropped() for name in whole & steady}, run, expected)
    repeatable = _replaceable(model, {name: _Repeated(parts[name]) for name in whole}, run, expected)
    with suppress(Exception), torch.no_grad():  # whatever a task makes of a model that has no attributes of its own
        if _shapes_of(run(_Repeated(model))) == expected:
            repeatable.add("")
    for name in [name for name in inside if not name or name in whole]:
        part, prefix = parts[name], f"{name}." if name else ""
        inner = tuple(group.name for group in groups if all(member.startswith(prefix) for member in group.members))
        kind = type(part).__name__ if type(part).__module__.startswith("torch.nn.") else ""
        grouped = getattr(part, "groups", 1) != 1
        yield Block(name, kind, inside[name], inner, name in droppable, name in repeatable, grouped)


def _layers_inside(model: nn.Module, name: str, layers: list[Layer], tied: list[set[int]]) -> tuple[str, ...]:
    """Of a module; none where it shares a weight with another. tied: ids of the modules that share one."""
    own, prefix = {id(part) for part in model.get_submodule(name).modules()}, f"{name}." if name else ""
    if any(places & own and places - own for places in tied):
        return ()
    return tuple(layer.name for layer in layers if layer.name == name or layer.name.startswith(prefix))


class _Wrapped(Replacement):
    """A module that is only called, and hides what it is made of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.part = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


class _Repeated(_Wrapped):
    """Runs twice, which what keeps something of what it was given (a cache) makes something else of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self.part(*cloned(args), **cloned(kwargs))
        again = self.part(*args, **kwargs)
        if not close(first, again):
            raise ValueError("gives something else when it runs again")
        return again


def _replaceable(model: nn.Module, others: Mapping[str, nn.Module], run: Run, expected: Any) -> set[str]:
    """Names of the modules that others can stand in for: those at one depth are tried together, and one by one if that
    fails."""
    found: set[str] = set()
    for depth in {name.count(".") for name in others}:
        level = {name: other for name, other in others.items() if name.count(".") == depth}
        if _runs_with(model, level, run, expected):
            found.update(level)
        else:
            found.update(name for name, other in level.items() if _runs_with(model, {name: other}, run, expected))
    return found


def _runs_with(model: nn.Module, others: Mapping[str, nn.Module], run: Run, expected: Any) -> bool:
    """Whether the model gives outputs of the same shape with these modules in place of those named."""
    old = {name: model.get_submodule(name) for name in others}
    for name, other in others.items():
        model.set_submodule(name, other.eval())
    try:
        with torch.no_grad():
            return bool(_shapes_of(run(model)) == expected)
    except Exception:  # whatever a model does when a part is missing: it needs the part
        return False
    finally:
        for name, part in old.items():
            model.set_submodule(name, part)


def _tensor_to_tensor(model: nn.Module, run: Run) -> tuple[Any, dict[str, bool]]:
    """(shapes of the outputs, modules that run once and make one tensor of another, none of them complex -> whether
    both have one shape)."""
    calls: dict[str, list[bool | None]] = {}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensors = bool(args) and all(isinstance(x, Tensor) and not x.is_complex() for x in (args[0], output))
            calls.setdefault(name, []).append(args[0].shape == output.shape if tensors else None)

        return hook

    with forward_hooks((module, watch(name)) for name, module in model.named_modules()), torch.no_grad():
        shapes = _shapes_of(run(model))
    order = [name for name, _ in model.named_modules()]
    once = {name: seen[0] for name, seen in calls.items() if len(seen) == 1 and (seen[0] is not None or not name)}
    return shapes, {name: bool(once[name]) for name in sorted(once, key=order.index)}


# ------------------------------------------------------------------ channel groups


def _shapes_of(output: Any) -> list[Any]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves(output)]


def _channel_groups(
    original: nn.Module, run: Run, left_alone: dict[str, str]
) -> tuple[tuple[ChannelGroup, ...], dict[str, list[tuple[str, float]]], set[str]]:
    """The groups that can be removed, the groups that touch each tensor, and the blocks that keep the shape of their
    input all the while."""
    try:
        attempt = _Attempt(copied(original), run)
        left_alone.update(attempt.graph.refused)
        for name in attempt.graph.groups:
            failed = attempt.remove(name) if attempt.graph.channels(name) > 1 else ""
            if failed:
                left_alone[name] = failed
    except Exception as error:  # the graph cannot follow this model: compress it without channel pruning
        left_alone["channels"] = f"the model cannot be traced for channel pruning: {in_words(error)}"
        return (), {}, {name for name, same in _tensor_to_tensor(original, run)[1].items() if same}
    order = list(attempt.graph.names.values())
    return tuple(sorted(attempt.groups, key=lambda g: order.index(g.name))), attempt.touched, attempt.steady


class _Attempt:
    """A model from which half of one group of channels after the other is removed, as far as it then still runs."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self._run = model, run
        self.graph = ChannelGraph(model, run)
        self._whole = self._shapes()
        self._expected, modules = _tensor_to_tensor(model, run)
        self.groups: list[ChannelGroup] = []
        self.touched: dict[str, list[tuple[str, float]]] = {}
        self.steady = {name for name, same in modules.items() if same}
        self._expected_in_training: Any = None
        with suppress(Exception):  # it may need more samples for that
            expected, trained = self._in_training()
            if trained.keys() != modules.keys():
                self._expected_in_training = expected

    def remove(self, name: str) -> str:
        """One channel of a group, or half of them: some models run without one, but not without many. When the model
        does not run as before, all stay, and the reason is returned."""
        count, members, units = self.graph.channels(name), self.graph.members(name), self.graph.coupled(name)
        before, shapes, steady = self.graph.snapshot(), self._shapes(), set(self.steady)
        if len(units) < 2:
            return "the model does not run without a part of its channels"
        try:
            self.graph.remove(name, units[0])
            one_less = self._shapes()
            failed = self._failed(steady)
            if not failed and len(units) > 3:
                self.graph.restore(before)
                self.graph.remove(name, sorted(itertools.chain(*units[: len(units) // 2])))
                failed = self._failed(steady)
        except Exception as error:
            failed = f"the model does not run without one of its channels: {in_words(error)}"
        if failed:
            self.graph.restore(before)
            return failed
        self.steady = steady
        for key, shape in one_less.items():
            for old, new, size in zip(shapes[key], shape, self._whole[key], strict=True):
                if old != new:
                    self.touched.setdefault(key, []).append((name, (old - new) / len(units[0]) * count / size))
        self.groups.append(ChannelGroup(name, count, tuple(dict.fromkeys(member for member, _ in members))))
        return ""

    def _failed(self, steady: set[str]) -> str:
        """Why the model does not give what it gave; also takes out of `steady` what is not any more."""
        shapes, modules = _tensor_to_tensor(self.model, self._run)
        if shapes != self._expected:
            return "its channels are outputs of the model"
        steady.intersection_update(name for name, same in modules.items() if same)
        if self._expected_in_training is not None and self._in_training()[0] != self._expected_in_training:
            return "its channels are outputs of the model in training"
        return ""

    def _in_training(self) -> tuple[Any, dict[str, bool]]:
        """A model may use layers then that it does not use later."""
        self.model.train()
        try:
            return _tensor_to_tensor(self.model, self._run)
        finally:
            self.model.eval()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(getattr(*places[0]).shape) for key, places in owners(self.model).items()}
