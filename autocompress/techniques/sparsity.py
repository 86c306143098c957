"""Unstructured pruning: the smallest weights of a layer are set to zero.

Magnitude pruning with regrowth: the dense weight keeps learning behind the mask (straight-through),
so that a weight that grows again returns (Zhu and Gupta, 2017; Lin et al., DPF, ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.anatomy import Anatomy
from autocompress.recipe import Choice
from autocompress.techniques.base import Masking, number_in, register


class Sparsity(Masking):
    name = "sparsity"
    default = 0.0
    about = "share of the weights of a layer that is zero"

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.0, 0.999, "give the share of zeros,")

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [layer.name for layer in anatomy.layers]

    def mask(self, weight: Tensor, choice: Choice) -> Tensor:
        zeros = min(int(float(choice) * weight.numel()), weight.numel() - 1)
        if zeros == 0:
            return torch.ones_like(weight, dtype=torch.bool)
        magnitude = weight.detach().abs().flatten()
        keep = torch.ones_like(magnitude, dtype=torch.bool)
        keep[magnitude.topk(zeros, largest=False).indices] = False
        return keep.view_as(weight)


register(Sparsity())
