"""Stacked small networks: a block, or the whole model, becomes k narrow copies of itself side by side.

`stack-2x0.25`: two copies, each with a quarter of the channels that live inside the block; `stack-2` is
`stack-2x0.5`. By importance, the first copy takes the first, third, ... channel, the second the others,
with the weights between them; what the copies give is averaged. So a wide block of n x n weights becomes k of
(n/k)^2. For the whole model it is an ensemble of narrow members (Zhao et al., Divide and Co-training, 2020).

Not for single layers, blocks without channels of their own, blocks where the copies would have as many weights, and
modules that do not make one tensor of one.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from autocompress.anatomy import Anatomy, Block, ChannelGraph, read_anatomy
from autocompress.replacement import Replacement
from autocompress.task import Calibration
from autocompress.techniques.importance import importance
from autocompress.techniques.structure import Structure, offer


class Stack(Replacement):
    """Its children, named 0, 1, ..., are the copies."""

    def __init__(self, copies: list[nn.Module]) -> None:
        super().__init__()
        for number, module in enumerate(copies):
            self.add_module(str(number), module)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return torch.stack([module(*args, **kwargs) for module in self.children()]).mean(0)


class Narrow(Structure):
    pattern, example = r"stack-\d(x[\d.]+)?", "stack-2x0.25"
    keeps_channels = False

    def check(self, choice: str) -> None:
        count, share = _parts(choice)
        if not (2 <= count <= 8 and 0 < share <= 1 / count):
            raise ValueError(choice)

    def fits(self, choice: str, block: Block, anatomy: Anatomy) -> bool:
        count, share = _parts(choice)
        left = 0.0
        for layer in (anatomy.layer(name) for name in block.layers):
            inner = [part for group, part in layer.groups if group in block.inner]
            left += count * layer.numel * math.prod(1 - part * (1 - share) for part in inner)
        widths = [group.channels for group in anatomy.groups if group.name in block.inner]
        return left < 0.95 * sum(anatomy.layer(name).numel for name in block.layers) and min(widths) * share >= 2

    def build(self, model: nn.Module, name: str, choice: str, run: Calibration) -> nn.Module:
        (count, share), copies = _parts(choice), []
        inner = next(block.inner for block in read_anatomy(model, run).blocks if block.name == name)
        for number in range(count):
            twin = copy.deepcopy(model)
            graph = ChannelGraph(twin, run)
            # all judged before any is removed: removal shifts the channels of concatenations
            judged = {group: importance("l2", graph, group, run) for group in inner}
            for group, values in judged.items():
                order = values.argsort(descending=True, stable=True).tolist()
                stay = order[number::count][: max(1, round(share * len(order)))]
                if stay:
                    graph.remove(group, sorted(set(order) - set(stay)))
            copies.append(twin.get_submodule(name))
        return Stack(copies)

    def blank(self, module: nn.Module, choice: str) -> nn.Module:
        return Stack([copy.deepcopy(module) for _ in range(_parts(choice)[0])])


def _parts(choice: str) -> tuple[int, float]:
    """Copies, and the share of the inner channels that each has."""
    count, _, share = choice.removeprefix("stack-").partition("x")
    return int(count), float(share) if share else 1 / int(count)


offer(Narrow())
