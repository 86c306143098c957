"""Which channels go first: the criterion of structured pruning.

`l1`, `l2`: norm of all weights that a channel owns over its group (Li et al., Pruning Filters for Efficient
ConvNets, ICLR 2017; Fang et al., DepGraph, CVPR 2023). `geometric-median`: filters that others can stand in for
go first (He et al., FPGM, CVPR 2019). `lamp`: norms relative to those that would stay (Lee et al., ICLR 2021).
`activation`: share of positive outputs of the channel's layer, what a ReLU lets through, ties by their mean
(Hu et al., Network Trimming, 2016; a norm between the two is not looked through). `kl`: change of the model's
output distribution without the channel (Luo and Wu, 2020). `random`: the control.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from autocompress.anatomy import ChannelGraph, Run
from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, register


class Importance(TrainingTechnique):
    """A choice for the whole model; it acts when channels are removed."""

    name = "importance"
    default = "l2"

    @property
    def about(self) -> str:  # type: ignore[override]
        return "which channels go first: " + ", ".join(_CRITERIA)

    def parse(self, raw: Any) -> Choice:
        if raw not in _CRITERIA:
            raise SpaceError(f"choice {raw!r} does not exist; choose from {', '.join(_CRITERIA)}")
        return str(raw)


def importance(criterion: str, graph: ChannelGraph, group: str, run: Run) -> Tensor:
    """Float [channels] of a group of `graph`: more is more important. `run(model)` runs a calibration batch."""
    return _CRITERIA[criterion](graph, group, run)


def _norm(measure: Callable[[Any], Any]) -> Callable[[ChannelGraph, str, Run], Tensor]:
    return lambda graph, group, run: graph.importance(group, measure)


def _random(graph: ChannelGraph, group: str, run: Run) -> Tensor:
    """The same for the same group, whatever else is random."""
    generator = torch.Generator().manual_seed(zlib.crc32(group.encode()))
    return torch.rand(graph.channels(group), generator=generator)


@torch.no_grad()
def _activation(graph: ChannelGraph, group: str, run: Run) -> Tensor:
    maker = graph.makers(group)[0]
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        places = [d for d in range(output.ndim) if d != _channel_dimension(module, output)]
        positive = output.float().clamp_min(0)
        seen.append((positive > 0).float().mean(places) + 1e-3 * positive.mean(places))

    handle = maker.register_forward_hook(watch)
    try:
        run(graph.model)
    finally:
        handle.remove()
    return torch.stack(seen).mean(0)


@torch.no_grad()
def _kl(graph: ChannelGraph, group: str, run: Run) -> Tensor:
    """Divergence of the output when the makers' channel is silent, one channel at a time."""
    makers = graph.makers(group)
    reference = _flat(run(graph.model))
    rise = []
    for channel in range(graph.channels(group)):
        handles = [maker.register_forward_hook(_silence(channel)) for maker in makers]
        try:
            output = _flat(run(graph.model))
        finally:
            for handle in handles:
                handle.remove()
        p, q = reference.log_softmax(1), output.log_softmax(1)
        rise.append((p.exp() * (p - q)).sum(1).mean())
    return torch.stack(rise)


def _silence(channel: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.select(_channel_dimension(module, output), channel).zero_()
        return output

    return hook


def _channel_dimension(module: nn.Module, output: Tensor) -> int:
    """Linear layers have channels last, convolutions before their places."""
    return output.ndim - 1 - (len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0)


def _flat(output: Any) -> Tensor:
    """The first tensor of an output as [samples, values]."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output.detach().float().flatten(1) if output.ndim > 1 else output.detach().float()[:, None]


_CRITERIA: dict[str, Callable[[ChannelGraph, str, Run], Tensor]] = {
    "l2": _norm(tp.importance.GroupMagnitudeImportance(p=2, normalizer="mean")),
    "l1": _norm(tp.importance.GroupMagnitudeImportance(p=1, normalizer="mean")),
    "geometric-median": _norm(tp.importance.FPGMImportance()),
    "lamp": _norm(tp.importance.LAMPImportance()),
    "activation": _activation,
    "kl": _kl,
    "random": _random,
}

register(Importance())
