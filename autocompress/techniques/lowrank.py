"""Low-rank layers: one layer becomes two with few channels between them.

`lowrank-0.25`: a quarter of the full rank, from the truncated singular value decomposition of the trained
weight as [outputs, inputs x kernel] (Denton et al., NeurIPS 2014; a convolution becomes one of few filters
and one of 1 x 1, Jaderberg et al., BMVC 2014). Both are trained on, pruned and quantised like any other.

Not for embeddings, recurrent and attention layers, grouped and transposed convolutions, layers that share their weight
or are not called as modules, and ranks that would not save weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.anatomy import Anatomy, Block
from autocompress.replacement import Replacement
from autocompress.task import Calibration
from autocompress.techniques.structure import Structure, offer

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class LowRank(Replacement):
    """into: the layer with `rank` outputs. out: pointwise, from there to all outputs."""

    hidden = frozenset({"into"})

    def __init__(self, into: Layer, out: Layer) -> None:
        super().__init__()
        self.into, self.out = into, out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x))  # type: ignore[no-any-return]


class Factorise(Structure):
    pattern, example = r"lowrank-[\d.]+", "lowrank-0.25"

    def check(self, choice: str) -> None:
        _share(choice)

    def fits(self, choice: str, block: Block, anatomy: Anatomy) -> bool:
        if block.kind not in [kind.__name__ for kind in _KINDS] or len(block.layers) != 1:
            return False
        shape = anatomy.layer(block.layers[0]).shape
        outputs, inputs = shape[0], math.prod(shape[1:])
        return not block.grouped and _rank(choice, outputs, inputs) * (outputs + inputs) < outputs * inputs

    @torch.no_grad()
    def build(self, model: nn.Module, name: str, choice: str, run: Calibration) -> nn.Module:
        module = model.get_submodule(name)
        assert isinstance(module, (LowRank, *_KINDS))
        if isinstance(module, LowRank):
            weight = (module.out.weight.flatten(1) @ module.into.weight.flatten(1)).float()
            layer, bias = module.into, module.out.bias
        else:
            weight, layer, bias = module.weight.flatten(1).float(), module, module.bias
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = _rank(choice, *weight.shape)
        new = _pair(layer, len(weight), rank, bias is not None).to(weight.device)
        root = s[:rank].sqrt()
        new.into.weight.copy_((root[:, None] * v[:rank]).view_as(new.into.weight))
        new.out.weight.copy_((u[:, :rank] * root).view_as(new.out.weight))
        if bias is not None and new.out.bias is not None:
            new.out.bias.copy_(bias)
        return new

    def blank(self, module: nn.Module, choice: str) -> nn.Module:
        assert isinstance(module, _KINDS)
        return _pair(
            module, len(module.weight), _rank(choice, *module.weight.flatten(1).shape), module.bias is not None
        )

    def follows(self, before: str, after: str) -> bool:
        return before.startswith("lowrank-") and _share(after) <= _share(before)


def _share(choice: str) -> float:
    share = float(choice.rpartition("-")[2])
    if not 0 < share < 1:
        raise ValueError(choice)
    return share


def _rank(choice: str, outputs: int, inputs: int) -> int:
    return max(1, round(_share(choice) * min(outputs, inputs)))


def _pair(layer: Layer, outputs: int, rank: int, bias: bool) -> LowRank:
    """Two untrained layers of the kind of `layer`."""
    if isinstance(layer, nn.Linear):
        return LowRank(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
    kind: Any = type(layer)
    same = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    return LowRank(kind(layer.in_channels, rank, bias=False, **same), kind(rank, outputs, 1, bias=bias))


offer(Factorise())
