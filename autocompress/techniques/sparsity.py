"""Unstructured and semi-structured pruning: the smallest weights of a layer are set to zero.

By share: magnitude pruning (Zhu and Gupta, 2017). By pattern, `2:4`: of each 4 neighbours in a row 2 stay, what
sparse tensor cores compute with (Mishra et al., 2021). By threshold, `threshold-0.5`: weights below half a
standard deviation of their layer are cut (Han et al., 2015). Masks are drawn again while fine-tuning: a pruned
weight keeps its value behind the mask and returns when others fall below it (dynamic network surgery, Guo
et al., NeurIPS 2016).

Not for layers of fewer than 16 weights and tensors of one dimension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import SpaceError
from autocompress.model.anatomy import Anatomy
from autocompress.recipe import Choice
from autocompress.techniques.base import Masking, number_in, register

_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3})")
_THRESHOLD = "threshold-"


class Sparsity(Masking):
    name = "sparsity"
    default = 0.0
    about = "share of the weights of a layer that is zero; or 2:4 (2 of each 4 stay), or threshold-0.5 (deviations)"

    def examples(self) -> Sequence[Choice]:
        return (0.0, 0.5, 0.95, "2:4", "threshold-0.5")

    def parse(self, raw: Any) -> Choice:
        if isinstance(raw, str):
            pattern = _PATTERN.fullmatch(raw)
            if pattern and 0 < int(pattern[1]) < int(pattern[2]):
                return raw
            try:
                if raw.startswith(_THRESHOLD) and 0 < float(raw.removeprefix(_THRESHOLD)) <= 5:
                    return raw
            except ValueError:
                pass
            raise SpaceError(
                f"choice {raw!r} does not exist; give the share of zeros, from 0 to 0.999, "
                f"a pattern like '2:4' in quotes, or {_THRESHOLD}0.5 (up to 5 standard deviations)"
            )
        return number_in(raw, 0.0, 0.999, "give a pattern like '2:4' in quotes, or the share of zeros,")

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [layer.name for layer in anatomy.layers]

    def mask(self, weight: Tensor, choice: Choice) -> Tensor:
        magnitude = weight.detach().abs()
        if isinstance(choice, str):
            pattern = _PATTERN.fullmatch(choice)
            if pattern:
                return _largest_of_each(magnitude, int(pattern[1]), int(pattern[2]))
            keep = magnitude >= float(choice.removeprefix(_THRESHOLD)) * weight.detach().std(correction=0)
            return keep if keep.any() else magnitude == magnitude.amax()
        zeros = min(int(float(choice) * weight.numel()), weight.numel() - 1)
        if zeros == 0:
            return torch.ones_like(weight, dtype=torch.bool)
        keep = torch.zeros_like(magnitude, dtype=torch.bool).flatten()
        keep[magnitude.flatten().topk(weight.numel() - zeros, sorted=False).indices] = True
        return keep.view_as(weight)


def _largest_of_each(magnitude: Tensor, stay: int, of: int) -> Tensor:
    """Bool: the `stay` largest of each `of` neighbours along a row; a shorter rest keeps as many."""
    rows = magnitude.reshape(magnitude.shape[0], -1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % of), value=-1.0).view(len(rows), -1, of)
    keep = torch.zeros_like(padded, dtype=torch.bool)
    keep.scatter_(2, padded.topk(stay, dim=2).indices, True)
    return keep.view(len(rows), -1)[:, : rows.shape[1]].reshape(magnitude.shape)


register(Sparsity())
