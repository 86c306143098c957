"""Structured pruning: whole channels are removed from every layer that shares them.

Groups come from Torch-Pruning's dependency graph (Fang et al., DepGraph, CVPR 2023); the least important
channels go first, by the criterion of `importance.py`, within each group or over all of them (`ranking.py`). Heads
of an attention that is written out go as a whole, or each becomes narrower, as its code lets them; queries that share
a key go with it. Heads that the graph cannot follow (rotary embeddings) are found by trying what reaches what.

Not for channels that are outputs of the model, that pass through a recurrent module, that a norm of groups
sees together with those of other layers, or whose layer shares its weight with one that has them in another order;
grouped convolutions that are not depthwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from autocompress.model.anatomy import Anatomy
from autocompress.model.channel_graph import ChannelGraph
from autocompress.recipe import Choice
from autocompress.task import Calibration
from autocompress.techniques.base import StructureTechnique, number_in, register
from autocompress.techniques.importance import Importance, importance, ranked
from autocompress.techniques.ranking import Ranking


def kept_channels(original: int, share: float) -> int:
    """Channels that stay of `original`: at least one."""
    return max(1, round(original * share))


class Channels(StructureTechnique):
    name = "channels"
    default = 1.0
    restores, permanent = False, True
    about = "share of the channels of a group that is kept; the rest is removed physically"

    def examples(self) -> Sequence[Choice]:
        return (1.0, 0.85, 0.5)

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.01, 1.0, "give the kept share,")

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [group.name for group in anatomy.groups]

    def apply(
        self,
        model: nn.Module,
        chosen: Mapping[str, Choice],
        run: Calibration,
        options: Mapping[str, Choice] | None = None,
    ) -> nn.Module:
        """`chosen` holds channel counts (site -> int): counts, unlike shares, also fit a pruned model."""
        if not chosen:
            return model
        graph = ChannelGraph(model, run.shortened(model), only=chosen)
        surplus = {name: graph.channels(name) - int(count) for name, count in chosen.items() if name in graph.groups}
        options = options or {}
        # all judged before any is removed: removal shifts the channels of concatenations
        criterion = str(options.get(Importance.name, Importance.default))
        competing = options.get(Ranking.name) == "global" and any(count > 0 for count in surplus.values())
        names = [name for name, count in surplus.items() if count > 0 or competing]
        judged = {name: importance(criterion, graph, name, run) for name in names}
        if competing:
            surplus = _least_important(graph, judged, surplus)
        for name, values in judged.items():
            graph.remove(name, _weakest(values, graph.coupled(name), surplus[name]))
        return model

    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> nn.Module:
        """Nothing to do: the shapes of the stored tensors show all."""
        return model

    def follows(self, before: Choice, after: Choice) -> bool:
        return float(after) <= float(before)


def _weakest(values: Tensor, coupled: list[list[int]], count: int) -> list[int]:
    """At least so many channels, the least important ones, with what they are coupled to; one stays."""
    out: list[int] = []
    for unit in ranked(values, coupled)[:-1]:
        if len(out) >= count:
            break
        out += unit
    return sorted(out)


def _least_important(graph: ChannelGraph, judged: Mapping[str, Tensor], surplus: Mapping[str, int]) -> dict[str, int]:
    """How many channels each group loses when all compete, for as many weights as `surplus` would take."""
    weights = {name: graph.weights(name) / len(values) for name, values in judged.items()}
    to_go = sum(max(count, 0) * weights[name] for name, count in surplus.items())
    ranked = []
    for name, values in judged.items():
        relative = values.double() / values.double().mean().clamp_min(1e-30)
        # the most important of each group always stays
        ranked += [(value, name) for value in sorted(relative.tolist())[:-1]]
    mean = sum(weights.values()) / len(weights)
    lost = dict.fromkeys(judged, 0)
    for _, name in sorted(ranked, key=lambda pair: pair[0] * mean / weights[pair[1]]):
        if to_go < weights[name] / 2:
            break
        lost[name] += 1
        to_go -= weights[name]
    return lost


register(Channels())
