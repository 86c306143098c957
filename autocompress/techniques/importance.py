"""Which channels go first: the criterion of structured pruning.

`l1`, `l2`: norm of all weights that a channel owns over its group (Li et al., Pruning Filters for Efficient
ConvNets, ICLR 2017; Fang et al., DepGraph, CVPR 2023). `geometric-median`: filters that others can stand in for
go first (He et al., FPGM, CVPR 2019). `lamp`: norms relative to those that would stay (Lee et al., ICLR 2021).
`activation`: share of positive outputs of the channel's layer, what a ReLU lets through, ties by their mean
(Hu et al., Network Trimming, 2016; a norm between the two is not looked through). `kl`: change of the model's
output distribution without the channel (Luo and Wu, 2020). `taylor`: first-order change of the loss without it
(Molchanov et al., CVPR 2019). `gates`: hard-concrete gates on the channels are trained for a few steps with a price
on open ones (Louizos et al., L0 regularisation, ICLR 2018); what closes first goes first. `random`: the control.

Not for layers: it ranks channels. `taylor` and `gates` need the outputs of a calibration batch to be tensors.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from autocompress.divergence import divergence
from autocompress.errors import SpaceError
from autocompress.model.channel_graph import ChannelGraph
from autocompress.model.hooks import Hook, forward_hooks
from autocompress.recipe import Choice
from autocompress.task import Calibration
from autocompress.techniques.base import TrainingTechnique, register


class Importance(TrainingTechnique):
    """A choice for the whole model; it acts when channels are removed."""

    name = "importance"
    default = "l2"

    @property
    def about(self) -> str:
        return "which channels go first: " + ", ".join(_CRITERIA)

    def examples(self) -> Sequence[Choice]:
        return tuple(_CRITERIA)

    def parse(self, raw: Any) -> Choice:
        if raw not in _CRITERIA:
            raise SpaceError(f"choice {raw!r} does not exist; choose from {', '.join(_CRITERIA)}")
        return str(raw)


def importance(criterion: str, graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
    """Float [channels] of a group of `graph`: more is more important. run: the calibration batches."""
    return _CRITERIA[criterion](graph, group, run)


def ranked(values: Tensor, coupled: Sequence[list[int]]) -> list[list[int]]:
    """The channels that go together (`ChannelGraph.coupled`), the least important first, by their mean. values: float
    [channels]."""
    known = values.tolist()
    means = torch.tensor([math.fsum(known[channel] for channel in unit) / len(unit) for unit in coupled])
    return [coupled[place] for place in means.argsort(stable=True).tolist()]


def _norm(measure: Callable[[Any], Any]) -> Callable[[ChannelGraph, str, Calibration], Tensor]:
    def measured(graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
        own = {parameter: parameter.data for parameter in graph.model.parameters()}
        try:
            for parameter, data in own.items():  # distances are not known of all numbers
                parameter.data = data.to(torch.promote_types(data.dtype, torch.float32))
            return graph.importance(group, measure)
        finally:
            for parameter, data in own.items():
                parameter.data = data

    return measured


def _random(graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
    """The same for the same group, whatever else is random."""
    generator = torch.Generator().manual_seed(zlib.crc32(group.encode()))
    return torch.rand(graph.channels(group), generator=generator)


@torch.no_grad()
def _activation(graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
    maker = graph.makers(group)[0]
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        places = [d for d in range(output.ndim) if d != _channel_dimension(module, output)]
        positive = output.float().clamp_min(0)
        seen.append((positive > 0).float().mean(places) + 1e-3 * positive.mean(places))

    with forward_hooks([(maker, watch)]):
        run(graph.model)
    return torch.stack(seen).mean(0)


@torch.no_grad()
def _kl(graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
    """Divergence of the output when the makers' channel is silent, one channel at a time."""
    makers = graph.makers(group)
    reference, target = run.run(graph.model)
    rise = []
    for channel in range(graph.channels(group)):
        with forward_hooks((maker, _silence(channel)) for maker in makers):
            rise.append(divergence(run(graph.model), reference, target))
    return torch.stack(rise)


def _taylor(graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
    """Needs gradients: those of the loss on a calibration batch."""
    graph.model.zero_grad()
    torch.autograd.backward(run.loss(graph.model))
    try:
        return graph.importance(group, tp.importance.GroupTaylorImportance(normalizer="mean"))
    finally:
        graph.model.zero_grad()


_STEPS, _STRETCH, _SLOPE = 20, (-0.1, 1.1), 2 / 3
"""Of training gates; ends of the stretched interval and temperature as in the paper."""


def _gates(graph: ChannelGraph, group: str, run: Calibration) -> Tensor:
    """Log odds of each gate after training. The price of an open gate is the same for all channels, so
    it moves all alike and does not change their order."""
    makers, count = graph.makers(group), graph.channels(group)
    device = next(graph.model.parameters()).device
    generator = torch.Generator().manual_seed(zlib.crc32(group.encode()))
    odds = torch.full((count,), 2.0, device=device, requires_grad=True)
    low, high = _STRETCH
    for _ in range(_STEPS):
        noise = torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
        soft = torch.sigmoid((noise.logit() + odds) / _SLOPE)
        gates = (soft * (high - low) + low).clamp(0, 1)
        with forward_hooks((maker, _scale(gates)) for maker in makers):
            (gradient,) = torch.autograd.grad(run.loss(graph.model), odds)
        with torch.no_grad():
            odds -= 0.2 * gradient * count**0.5 / gradient.norm().clamp_min(1e-12)
    return odds.detach()


def _scale(gates: Tensor) -> Hook:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = [1] * output.ndim
        shape[_channel_dimension(module, output)] = len(gates)
        return output * gates.view(shape).to(output.dtype)

    return hook


def _silence(channel: int) -> Hook:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.select(_channel_dimension(module, output), channel).zero_()
        return output

    return hook


def _channel_dimension(module: nn.Module, output: Tensor) -> int:
    """Linear layers have channels last, convolutions before their places."""
    return output.ndim - 1 - (len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0)


_CRITERIA: dict[str, Callable[[ChannelGraph, str, Calibration], Tensor]] = {
    "l2": _norm(tp.importance.GroupMagnitudeImportance(p=2, normalizer="mean")),
    "l1": _norm(tp.importance.GroupMagnitudeImportance(p=1, normalizer="mean")),
    "geometric-median": _norm(tp.importance.FPGMImportance()),
    "lamp": _norm(tp.importance.LAMPImportance()),
    "activation": _activation,
    "kl": _kl,
    "taylor": _taylor,
    "gates": _gates,
    "random": _random,
}

register(Importance())
