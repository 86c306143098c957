"""Filter clustering: whole filters are shared, so the file holds each of them once.

`filters-0.5`: half as many distinct filters (rows of the weight) as outputs, found by k-means (Lloyd, 1957; Son
et al., Clustering Convolutional Kernels, ECCV 2018) and kept as int4. Every output keeps its bias, its norm and
its place in the next layer. While fine-tuning a shared filter moves by the mean of its members' gradients.

Not for vectors; with sparsity, a weight of a shared filter is zero only where all its members are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, IntegerCoding, register
from autocompress.techniques.integers import Integers

_INTEGERS, _FORMAT = Integers(), "int4"


class Filters(IntegerCoding):
    """Learned parameters: that of the int4 coding, then for each row the number of its filter (fixed)."""

    tag = 4
    repeats = True

    def choices(self) -> Sequence[Choice]:
        return ("filters-0.75", "filters-0.5", "filters-0.25")

    def bits(self, choice: Choice) -> float:
        return _INTEGERS.bits(_FORMAT) * _share(choice)

    def layout(self, choice: Choice) -> tuple[int, int]:
        return _INTEGERS.layout(_FORMAT)

    def parameters(self, choice: Choice, shape: tuple[int, ...]) -> int:
        return 1 + (shape[0] if len(shape) > 1 else 0)

    def stored(self, choice: Choice, shape: tuple[int, ...]) -> int:
        return 1

    def initial(self, weight: Tensor, choice: Choice, clipping: str = "mse") -> Tensor:
        rows = weight.detach().float().flatten(1) if weight.ndim > 1 else weight.detach().float().reshape(1, -1)
        labels = rows.new_zeros(len(rows) if weight.ndim > 1 else 0)
        if weight.ndim > 1 and weight.numel():
            count = max(1, round(_share(choice) * len(rows)))
            found = _clusters(rows, count)
            rows = _means(rows, found)
            labels = found.to(labels)
        return torch.cat([_INTEGERS.initial(rows, _FORMAT, clipping), labels])

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        return _INTEGERS.simulate(_shared(weight, parameters), _FORMAT, parameters[:1])

    def scaled(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        return _INTEGERS.scaled(_shared(weight, parameters), _FORMAT, parameters[:1])

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        return _INTEGERS.encode(_shared(weight, parameters), _FORMAT, parameters[:1])

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        return _INTEGERS.decode(coded, _FORMAT)


def _share(choice: Choice) -> float:
    return float(str(choice).rpartition("-")[2])


def _clusters(rows: Tensor, count: int) -> Tensor:
    """int64 [rows]: the number of the cluster of each."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters are welcome
        found = KMeans(count, n_init=1, random_state=0).fit(rows.cpu().double().numpy()).labels_
    return torch.from_numpy(found).long().to(rows.device)


def _means(rows: Tensor, labels: Tensor) -> Tensor:
    """float32 [filters, n]: the mean of the rows of each."""
    count = int(labels.max()) + 1
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, labels, rows)
    return sums / torch.bincount(labels, minlength=count).clamp_min(1)[:, None]


def _shared(weight: Tensor, parameters: Tensor) -> Tensor:
    """`weight` with every row in place of which its filter stands; differentiable."""
    if weight.ndim < 2 or not weight.numel():
        return weight
    labels = parameters[1:].detach().round().long().clamp(0, len(weight) - 1)
    return _means(weight.flatten(1), labels)[labels].view_as(weight)


register(Filters())
