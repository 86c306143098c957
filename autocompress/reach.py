"""Which outputs of some layers reach which inputs of the next, by trying: the heads of an attention, whatever it does
with them (rotary embeddings, keys that several queries share)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.hooks import Hook, forward_hooks
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
    """Of the linear layers `among` which, with one that is `wanted`, at least two units go into one linear layer. run:
    the model on a batch."""
    with seeded(0):
        ends = {taker: makers for taker, makers in _ends(model, run, among).items() if {*makers} & {*wanted}}
        if not ends:
            return []
        probe = _Probe(model, run, ends)
        searches = [_Search(taker, makers) for taker, makers in ends.items()]
        while open_ := [search for search in searches if not search.done]:
            back = probe.back({search.taker: search.inputs for search in open_})
            for search in open_:
                search.outputs = {maker: back[maker] for maker in search.makers}
            there = probe.forth({maker: found for search in open_ for maker, found in search.outputs.items()})
            for search in open_:
                search.go_on(there[search.taker])
    return [found for search in searches if (found := search.result())]


def _ends(
    model: nn.Module, run: Callable[[nn.Module], Any], among: Collection[nn.Module]
) -> dict[nn.Linear, tuple[nn.Linear, ...]]:
    """The last linear layer of each smallest module that has one of `among` and a later one -> all earlier ones, which
    must be of `among`, too. Each runs once."""
    runs: list[nn.Module] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), forward_hooks((module, lambda module, *_: runs.append(module)) for module in linear):
        run(model)
    count, place = Counter(runs), {module: at for at, module in enumerate(runs)}
    out: dict[nn.Linear, tuple[nn.Linear, ...]] = {}
    for parent in reversed([*model.modules()]):  # the inner ones first
        inside = [module for module in parent.modules() if isinstance(module, nn.Linear) and count[module] == 1]
        inside.sort(key=lambda module: place[module])
        if len(inside) > 1 and out.keys().isdisjoint(inside) and {*among}.issuperset(inside[:-1]):
            out[inside[-1]] = (*inside[:-1],)
    return out


class _Probe:
    """The model with other numbers in place of what the makers say, and takers that say what they always say."""

    def __init__(
        self, model: nn.Module, run: Callable[[nn.Module], Any], ends: Mapping[nn.Linear, tuple[nn.Linear, ...]]
    ) -> None:
        self._model, self._run = model, run
        self._said: dict[nn.Module, Tensor] = {}
        self._given: dict[nn.Module, Tensor] = {}
        makers = [maker for each in ends.values() for maker in each]

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self._said[module] = output.detach()

        with torch.no_grad(), forward_hooks((module, keep) for module in (*makers, *ends)):
            run(model)
        for maker in makers:
            self._said[maker] = torch.randn_like(self._said[maker]).requires_grad_()
        self._makers = makers
        self._hooks: list[tuple[nn.Module, Hook]] = [(maker, self._say) for maker in makers]
        self._hooks += [(taker, self._take) for taker in ends]
        self._again()
        self._first = dict(self._given)

    def _say(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._said[module] * 1.0  # which what follows may change in place

    def _take(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._given[module] = args[0]
        return self._said[module]

    def _again(self) -> None:
        with forward_hooks(self._hooks):
            self._run(self._model)

    def back(self, inputs: Mapping[nn.Linear, set[int]]) -> dict[nn.Module, set[int]]:
        """Maker -> its channels that reach these of the takers."""
        wanted = {taker: torch.zeros_like(self._first[taker]) for taker in inputs}
        for taker, channels in inputs.items():
            places = wanted[taker][..., sorted(channels)]
            wanted[taker][..., sorted(channels)] = torch.randn_like(places)
        said = [self._said[maker] for maker in self._makers]
        gradients = torch.autograd.grad(
            [self._first[taker] for taker in wanted], said, [*wanted.values()], retain_graph=True, allow_unused=True
        )
        return {
            maker: _channels(gradient != 0) if gradient is not None else set()
            for maker, gradient in zip(self._makers, gradients, strict=True)
        }

    @torch.no_grad()
    def forth(self, outputs: Mapping[nn.Linear, set[int]]) -> dict[nn.Module, set[int]]:
        """Taker -> its channels that these of the makers reach."""
        said = dict(self._said)
        for maker, channels in outputs.items():
            self._said[maker] = said[maker].clone()
            places = self._said[maker][..., sorted(channels)]
            self._said[maker][..., sorted(channels)] = torch.randn_like(places)
        self._again()
        self._said = said
        return {taker: _channels(given != self._first[taker]) for taker, given in self._given.items()}


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
