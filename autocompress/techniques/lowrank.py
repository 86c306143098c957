"""Low-rank layers: one layer becomes two with few channels between them.

`lowrank-0.25`: a quarter of the full rank, from the truncated singular value decomposition of the trained
weight as [outputs, inputs x kernel] (Denton et al., NeurIPS 2014; a convolution becomes one of few filters
and one of 1 x 1, Jaderberg et al., BMVC 2014). Both are trained on, pruned and quantised like any other.

Not for embeddings, recurrent layers, grouped and transposed convolutions, layers that share their weight
or are not called as modules, and ranks that would not save weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.model.anatomy import Anatomy, Block
from autocompress.model.replacement import Replacement
from autocompress.task import Calibration
from autocompress.techniques.structure import Structure, offer

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class LowRank(Replacement):
    """into: the layer with `rank` outputs. out: pointwise, from there to all outputs. bend: what is between."""

    hidden = frozenset({"into"})

    def __init__(self, into: Layer, out: Layer, bend: nn.Module | None = None) -> None:
        super().__init__()
        self.into, self.bend, self.out = into, bend or nn.Identity(), out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.bend(self.into(x)))
        return y

    @torch.no_grad()
    def fill(self, into: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """into: float32 [rank, inputs x kernel]. out: float32 [outputs, rank]. bias: float32 [outputs]."""
        self.into.weight.copy_(into.view_as(self.into.weight))
        self.out.weight.copy_(out.view_as(self.out.weight))
        if self.out.bias is not None and bias is not None:
            self.out.bias.copy_(bias)


class Factorise(Structure):
    pattern, example = r"lowrank-[\d.]+", "lowrank-0.25"

    def check(self, choice: str) -> None:
        _share(choice)

    def fits(self, choice: str, block: Block, anatomy: Anatomy) -> bool:
        return weights_saved(block, anatomy, _share(choice), 1)

    def build(self, model: nn.Module, name: str, choice: str, run: Calibration) -> Replacement:
        layer, into, out, bias = factors(model.get_submodule(name))
        rank = rank_of(_share(choice), len(out), into.shape[1])
        new = pair(layer, len(out), rank, bias is not None)
        new.fill(into[:rank], out[:, :rank], bias)
        return new

    def blank(self, module: nn.Module, choice: str) -> Replacement:
        assert isinstance(module, KINDS)
        rank = rank_of(_share(choice), *module.weight.flatten(1).shape)
        return pair(module, len(module.weight), rank, module.bias is not None)

    def follows(self, before: str, after: str) -> bool:
        return before.startswith("lowrank-") and _share(after) <= _share(before)


def _share(choice: str) -> float:
    share = float(choice.rpartition("-")[2])
    if not 0 < share < 1:
        raise ValueError(choice)
    return share


def rank_of(share: float, outputs: int, inputs: int) -> int:
    """At least one; inputs: inputs x kernel."""
    return max(1, round(share * min(outputs, inputs)))


def weights_saved(block: Block, anatomy: Anatomy, share: float, count: int) -> bool:
    """Whether `block` is a layer that `count` pairs of this share of its rank have fewer weights than."""
    if block.kind not in [kind.__name__ for kind in KINDS] or len(block.layers) != 1 or block.grouped:
        return False
    shape = anatomy.layer(block.layers[0]).shape
    outputs, inputs = shape[0], math.prod(shape[1:])
    return count * rank_of(share, outputs, inputs) * (outputs + inputs) < outputs * inputs


@torch.no_grad()
def factors(module: nn.Module) -> tuple[Layer, Tensor, Tensor, Tensor | None]:
    """(layer to be like, into float32 [full rank, inputs x kernel], out float32 [outputs, full rank], bias): the
    singular value decomposition of a layer's weight, the largest values first, shared by both sides."""
    assert isinstance(module, (LowRank, *KINDS))
    if isinstance(module, LowRank):
        weight = module.out.weight.flatten(1).float() @ module.into.weight.flatten(1).float()
        layer, bias = module.into, module.out.bias
    else:
        weight, layer, bias = module.weight.flatten(1).float(), module, module.bias
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s.sqrt()
    return layer, root[:, None] * v, u * root, bias


def pair(layer: Layer, outputs: int, rank: int, bias: bool, bend: nn.Module | None = None) -> LowRank:
    """Two untrained layers of the kind, dtype and device of `layer`."""
    if isinstance(layer, nn.Linear):
        made = LowRank(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, outputs, bias=bias), bend)
    else:
        kind: Any = type(layer)
        same = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        made = LowRank(kind(layer.in_channels, rank, bias=False, **same), kind(rank, outputs, 1, bias=bias), bend)
    return made.to(layer.weight)


offer(Factorise())
