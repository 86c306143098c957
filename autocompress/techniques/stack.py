"""Stacked small networks: a layer, a block or the whole model becomes k narrow networks side by side.

`stack-2x0.25`: two, each with a quarter of the channels that live inside the block; `stack-2` is `stack-2x0.5`. By
importance, the first takes the first, third, ... channel, the second the others, with the weights between them;
what they give is averaged. So a wide block of n x n weights becomes k of (n/k)^2. For the whole model it is an
ensemble of narrow members (Zhao et al., Divide and Co-training, 2020). A single layer has no channels inside: each of
its networks has that share of its singular directions and bends between them, by a parametric ReLU (He et al., ICCV
2015) that begins as the identity.

Not for blocks without channels of their own or where the networks would have as many weights, grouped and transposed
convolutions, modules that do not make one tensor of one, and those that give something else when they run again
(as they do with a cache).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import RecipeError
from autocompress.model.anatomy import Anatomy, Block, read_anatomy
from autocompress.model.channel_graph import ChannelGraph
from autocompress.model.reparametrization import copied
from autocompress.model.replacement import Replacement
from autocompress.nested import cloned, leaves, map_leaves
from autocompress.task import Calibration
from autocompress.techniques.importance import importance, ranked
from autocompress.techniques.lowrank import KINDS, LowRank, factors, pair, rank_of, weights_saved
from autocompress.techniques.structure import Structure, offer


class Stack(Replacement):
    """Its children, named 0, 1, ..., are the copies."""

    def __init__(self, copies: list[nn.Module]) -> None:
        super().__init__()
        for number, module in enumerate(copies):
            self.add_module(str(number), module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *others, last = self.children()
        # the last may compute in place, as the module did
        outputs = [module(*cloned(args), **cloned(kwargs)) for module in others] + [last(*args, **kwargs)]
        means = (_mean(each) for each in zip(*map(leaves, outputs), strict=True))
        return map_leaves(outputs[0], lambda leaf: next(means))


def _mean(values: Sequence[Any]) -> Any:
    """Of tensors of floats; of anything else the first."""
    floats = isinstance(values[0], Tensor) and values[0].is_floating_point()
    return torch.stack(list(values)).mean(0) if floats else values[0]


class Narrow(Structure):
    pattern, example = r"stack-\d(x[\d.]+)?", "stack-2x0.25"
    keeps_channels = False

    def check(self, choice: str) -> None:
        count, share = _parts(choice)
        if not (2 <= count <= 8 and 0 < share <= 1 / count):
            raise ValueError(choice)

    def fits(self, choice: str, block: Block, anatomy: Anatomy) -> bool:
        count, share = _parts(choice)
        if not block.repeatable:
            return False
        if not block.inner:
            return weights_saved(block, anatomy, share, count)
        left = 0.0
        for layer in (anatomy.layer(name) for name in block.layers):
            inner = [part for group, part in layer.groups if group in block.inner]
            left += count * layer.numel * math.prod(1 - part * (1 - share) for part in inner)
        widths = [group.channels for group in anatomy.groups if group.name in block.inner]
        return left < 0.95 * sum(anatomy.layer(name).numel for name in block.layers) and min(widths) * share >= 2

    def build(self, model: nn.Module, name: str, choice: str, run: Calibration) -> Replacement:
        (count, share), copies = _parts(choice), []
        if isinstance(model.get_submodule(name), (LowRank, *KINDS)):
            return _bent(model.get_submodule(name), count, share)
        short = run.shortened(model)
        inner = next((block.inner for block in read_anatomy(model, short).blocks if block.name == name), ())
        if not inner:
            raise RecipeError(f"{name or 'the model'} cannot be made {choice!r}: too few of its channels are left")
        for number in range(count):
            twin = copied(model)
            graph = ChannelGraph(twin, short)
            # all judged before any is removed: removal shifts the channels of concatenations
            judged = {group: ranked(importance("l2", graph, group, run), graph.coupled(group))[::-1] for group in inner}
            for group, units in judged.items():
                kept = units[number % len(units) :: count][: max(1, round(share * len(units)))]
                graph.remove(group, sorted({*chain(*units)}.difference(*kept)))
            copies.append(twin.get_submodule(name))
        return Stack(copies)

    def blank(self, module: nn.Module, choice: str) -> Replacement:
        count, share = _parts(choice)
        if isinstance(module, KINDS):
            rank = rank_of(share, *module.weight.flatten(1).shape)
            shape = module, len(module.weight), rank, module.bias is not None
            return Stack([pair(*shape, nn.PReLU(init=1.0)) for _ in range(count)])
        return Stack([copy.deepcopy(module) for _ in range(count)])


def _bent(module: nn.Module, count: int, share: float) -> Stack:
    """A layer as networks of two layers; together they do at first what its truncated decomposition does."""
    layer, into, out, bias = factors(module)
    rank = rank_of(share, len(out), into.shape[1])
    networks = []
    for number in range(count):
        own = range(number, min(count * rank, len(into)), count)
        weight = count if own else 0  # a pruned layer can have fewer directions than networks
        own = own or range(1)
        network = pair(layer, len(out), len(own), bias is not None, nn.PReLU(init=1.0))
        network.fill(into[own], weight * out[:, own], bias)
        networks.append(network)
    return Stack(list(networks))


def _parts(choice: str) -> tuple[int, float]:
    """Copies, and the share of the inner channels that each has."""
    count, _, share = choice.removeprefix("stack-").partition("x")
    return int(count), float(share) if share else 1 / int(count)


offer(Narrow())
