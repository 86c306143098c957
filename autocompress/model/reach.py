"""Which outputs of some layers reach which inputs of the next, by trying: the heads of an attention, whatever it does
with them (rotary embeddings, keys that several queries share)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.model.hooks import forward_hooks
from autocompress.seeds import seeded

_MOST_UNITS = 128
"""Channels that can go one by one are found by following them: these are heads."""


@dataclass(frozen=True)
class Reach:
    """Layers and the next one, and their channels in units of which none reaches what is another's: for each unit the
    output channels of each maker and the input channels of the taker."""

    makers: tuple[nn.Linear, ...]
    taker: nn.Linear
    units: tuple[tuple[tuple[list[int], ...], list[int]], ...]


@torch.enable_grad()
def reaches(
    model: nn.Module, run: Callable[[nn.Module], Any], among: Collection[nn.Module], wanted: Collection[nn.Module]
) -> list[Reach]:
    """Of the linear layers `among` which, with one that is `wanted`, at least two units go into one linear layer, and
    into no other. run: the model on a batch."""
    with seeded(0):
        probe = _Probe(model, run)
        searches = [_Search(taker, makers) for taker, makers in _ends(probe, among, wanted).items()]
        while open_ := [search for search in searches if not search.done]:
            back = probe.back({search.taker: search.inputs for search in open_})
            for search in open_:
                search.outputs = {maker: back[maker] for maker in search.makers}
            there = probe.forth({maker: found for search in open_ for maker, found in search.outputs.items()})
            for search in open_:
                search.go_on(there[search.taker])
    return [found for search in searches if (found := search.result())]


def _ends(
    probe: _Probe, among: Collection[nn.Module], wanted: Collection[nn.Module]
) -> dict[nn.Linear, tuple[nn.Linear, ...]]:
    """Layer that takes outputs of a wanted one -> all whose it takes, if all are `among` and no other takes them."""
    out: dict[nn.Linear, tuple[nn.Linear, ...]] = {}
    left = [layer for layer in probe.layers if layer in wanted]
    while left:
        makers = left[:1]
        takers = probe.takers(makers)
        if len(takers) == 1:
            makers += [maker for maker in probe.makers(*takers) if maker not in makers]
            if {*among}.issuperset(makers) and probe.takers(makers) == takers:
                out[takers[0]] = (*(layer for layer in probe.layers if layer in makers),)
        left = [layer for layer in left if layer not in makers]
    return out


class _Probe:
    """The model, each of whose linear layers that run once outputs random numbers, always the same, whatever its input.
    layers: these, in the order in which they run."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        self._model, self._run = model, run
        self._outputs: dict[nn.Linear, Tensor] = {}
        self._inputs: dict[nn.Linear, Tensor] = {}
        runs: list[nn.Linear] = []

        def listen(module: nn.Linear, args: Any, output: Tensor) -> None:
            runs.append(module)
            self._outputs[module] = output

        with torch.no_grad(), forward_hooks((m, listen) for m in model.modules() if isinstance(m, nn.Linear)):
            run(model)
        self.layers = [layer for layer, count in Counter(runs).items() if count == 1]
        self._outputs = {layer: torch.randn_like(self._outputs[layer]).requires_grad_() for layer in self.layers}
        self._again()
        self._first = dict(self._inputs)

    def _substitute(self, layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._inputs[layer] = args[0]
        return self._outputs[layer] * 1.0  # which what follows may change in place

    def _again(self) -> None:
        with forward_hooks((layer, self._substitute) for layer in self.layers):
            self._run(self._model)

    def takers(self, makers: Sequence[nn.Linear]) -> list[nn.Linear]:
        """The layers whose inputs change when the outputs of these do."""
        changed = self.forth({maker: {*range(maker.out_features)} for maker in makers})
        return [taker for taker, channels in changed.items() if channels]

    def makers(self, taker: nn.Linear) -> list[nn.Linear]:
        """The layers whose outputs the taker is given something of."""
        reaching = self.back({taker: {*range(taker.in_features)}})
        return [maker for maker, channels in reaching.items() if channels]

    def back(self, inputs: Mapping[nn.Linear, set[int]]) -> dict[nn.Linear, set[int]]:
        """Layer -> its output channels that reach these inputs of others."""
        wanted = {taker: torch.zeros_like(self._first[taker]) for taker in inputs}
        for taker, channels in inputs.items():
            places = wanted[taker][..., sorted(channels)]
            wanted[taker][..., sorted(channels)] = torch.randn_like(places)
        taken, made = [self._first[taker] for taker in wanted], [*self._outputs.values()]
        found = torch.autograd.grad(taken, made, [*wanted.values()], retain_graph=True, allow_unused=True)
        gradients = zip(self._outputs, found, strict=True)
        return {layer: set() if gradient is None else _channels(gradient != 0) for layer, gradient in gradients}

    @torch.no_grad()
    def forth(self, outputs: Mapping[nn.Linear, set[int]]) -> dict[nn.Linear, set[int]]:
        """Layer -> its input channels that these outputs of others reach."""
        before = dict(self._outputs)
        for maker, channels in outputs.items():
            self._outputs[maker] = before[maker].clone()
            places = self._outputs[maker][..., sorted(channels)]
            self._outputs[maker][..., sorted(channels)] = torch.randn_like(places)
        self._again()
        self._outputs = before
        return {layer: _channels(given != self._first[layer]) for layer, given in self._inputs.items()}


def _channels(changed: Tensor) -> set[int]:
    return {*changed.flatten(0, -2).any(0).nonzero().flatten().tolist()}


class _Search:
    """For the units of one taker, one after the other."""

    def __init__(self, taker: nn.Linear, makers: tuple[nn.Linear, ...]) -> None:
        self.taker, self.makers = taker, makers
        self.inputs, self.outputs = {0}, dict[nn.Linear, set[int]]()
        self.done, self._failed = False, False
        self._units: list[tuple[tuple[list[int], ...], list[int]]] = []

    def go_on(self, reached: set[int]) -> None:
        """reached: the inputs that the present outputs reach."""
        if not self.inputs <= reached:  # an input that no output reaches
            self.done = self._failed = True
        elif reached != self.inputs:
            self.inputs = reached
        else:
            self._units.append((tuple(sorted(self.outputs[maker]) for maker in self.makers), sorted(self.inputs)))
            known = {channel for _, inputs in self._units for channel in inputs}
            self.inputs = {min({*range(self.taker.in_features)} - known, default=0)}
            self.done = len(known) == self.taker.in_features or len(self._units) > _MOST_UNITS

    def result(self) -> Reach | None:
        """None where there are no two units, or where they are not alike or not all that there is."""
        sizes = {(*map(len, outputs), len(inputs)) for outputs, inputs in self._units}
        if self._failed or len(self._units) < 2 or len(sizes) > 1:
            return None
        whole = (*(maker.out_features for maker in self.makers), self.taker.in_features)
        parts = [*zip(*((*outputs, inputs) for outputs, inputs in self._units), strict=True)]
        complete = all(sorted(chain(*part)) == [*range(size)] for part, size in zip(parts, whole, strict=True))
        return Reach(self.makers, self.taker, tuple(self._units)) if complete else None
