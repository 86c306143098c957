"""Structured pruning: whole channels are removed from every layer that shares them.

Groups come from Torch-Pruning's dependency graph (Fang et al., DepGraph, CVPR 2023); the least important
channels go first, by the criterion of `importance.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from autocompress.anatomy import Anatomy, ChannelGraph, Run
from autocompress.recipe import Choice
from autocompress.techniques.base import StructureTechnique, number_in, register
from autocompress.techniques.importance import Importance, importance


def kept_channels(original: int, share: float) -> int:
    """Channels that stay of `original`: at least one."""
    return max(1, round(original * share))


class Channels(StructureTechnique):
    name = "channels"
    default = 1.0
    restores, permanent = False, True
    about = "share of the channels of a group that is kept; the rest is removed physically"

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.01, 1.0, "give the kept share,")

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [group.name for group in anatomy.groups]

    def apply(
        self, model: nn.Module, chosen: Mapping[str, Choice], run: Run, options: Mapping[str, Choice] | None = None
    ) -> nn.Module:
        """`chosen` holds channel counts (site -> int): counts, unlike shares, also fit a pruned model."""
        if not chosen:
            return model
        graph = ChannelGraph(model, run)
        surplus = {name: graph.channels(name) - int(count) for name, count in chosen.items() if name in graph.groups}
        # all judged before any is removed: removal shifts the channels of concatenations
        criterion = str((options or {}).get(Importance.name, Importance.default))
        judged = {name: importance(criterion, graph, name, run) for name, count in surplus.items() if count > 0}
        for name, values in judged.items():
            graph.remove(name, sorted(values.argsort(stable=True)[: surplus[name]].tolist()))
        return model

    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> nn.Module:
        """Nothing to do: the shapes of the stored tensors tell all."""
        return model

    def follows(self, before: Choice, after: Choice) -> bool:
        return float(after) <= float(before)


register(Channels())
