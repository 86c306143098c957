"""Torch-Pruning's tracing of a model, mended where it goes astray, and quiet."""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch
import torch_pruning as tp
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch_pruning.dependency import index_mapping, shape_infer
from torch_pruning.dependency.group import Group

_MOST_MEMBERS, _MOST_PLACES = 1000, 300_000
"""Operations in which the channels of one group are found, and places in all of them, of a group of few channels."""

_MENDING = threading.RLock()
"""Held while Torch-Pruning is changed, which is for all threads."""

_LAST = 2**64 - 1
"""The last dimension, -1, as autograd tells it."""


@contextmanager
def quiet() -> Iterator[None]:
    """It warns of much that is looked after here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class EndlessError(Exception):
    """A group that is given up."""

    def __init__(self, group: Any) -> None:
        super().__init__(f"they are found in more than {group.places - 1:,} places")
        self.group = group


@contextmanager
def mended() -> Iterator[None]:
    """Torch-Pruning without four of its faults: it goes on for ever with channels that are cut and joined (rotary
    embeddings, shifted windows), which find new ways to themselves each time; it adds up channels before it asks
    whether all are known; it divides by their number where it knows none (shuffled channels); and it takes the parts of
    a split in the order in which it comes upon them."""
    add = Group.add_dep

    def add_dep(group: Any, dep: Any, idxs: Any) -> None:
        add(group, dep, idxs)
        group.places = getattr(group, "places", 0) + len(idxs)
        if len(group) > _MOST_MEMBERS or group.places > max(_MOST_PLACES, _MOST_MEMBERS * len(group[0].idxs)):
            raise EndlessError(group)

    def without(error: type[Exception], update: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def tried(graph: Any, node: Any) -> None:
            with suppress(error):
                update(graph, node)

        return tried

    concat = without(TypeError, index_mapping.update_concat_index_mapping)
    reshape = without(ZeroDivisionError, index_mapping.update_reshape_index_mapping)
    with (
        _MENDING,
        mock.patch.object(Group, "add_dep", add_dep),
        mock.patch.object(index_mapping, "update_concat_index_mapping", concat),
        mock.patch.object(index_mapping, "update_reshape_index_mapping", reshape),
        mock.patch.object(shape_infer, "init_shape_information", _read_splits),
        mock.patch.object(index_mapping, "update_split_index_mapping", _map_split),
    ):
        yield


def _read_splits(graph: Any) -> None:
    """The parts of each split, in their order."""
    for node in graph.module2node.values():
        if node.type == tp.ops.OPTYPE.SPLIT:
            node.outputs.sort(key=lambda behind: _part(node, behind) or 0)
            node.module.split_sizes = _sizes(node.grad_fn)
            # which are not looked at behind a token of class, lest it is tokens that are split
            node.enable_index_mapping |= getattr(node.grad_fn, "_saved_dim", None) == _LAST


def _part(split: Any, behind: Any) -> int | None:
    """Which part the node is given: one, as `Following` has it."""
    return next((part for step, part in behind.grad_fn.next_functions if step is split.grad_fn), None)


def _sizes(split: Any) -> list[int] | None:
    """Channels of each part that this step of the graph of gradients makes; None where it is not channels that it
    splits."""
    dimension = {1: 1, _LAST: -1}.get(getattr(split, "_saved_dim", 0))
    if dimension is None or not hasattr(split, "_saved_self_sym_sizes"):
        return None
    if hasattr(split, "_saved_split_sizes"):
        return [*split._saved_split_sizes]
    count, each = split._saved_self_sym_sizes[dimension], split._saved_split_size
    return [min(each, count - begin) for begin in range(0, count, each)]


def _map_split(graph: Any, split: Any) -> None:
    """Which channels each of the nodes behind a split is given."""
    if not split.enable_index_mapping or not split.module.split_sizes:
        return
    ends = [0, *itertools.accumulate(split.module.split_sizes)]
    for behind in split.outputs:
        part = _part(split, behind)
        if part is not None:
            for one, other, reverse in ((split, behind, False), (behind, split, True)):
                for dep in one.dependencies:
                    if dep.target is other:
                        dep.index_mapping[0] = index_mapping._SplitIndexMapping(ends[part : part + 2], reverse)


class Following(TorchFunctionMode):
    """Has functions whose operations would be followed for the channels compute others, with the same channels, and
    keeps what splits channels into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.parts, self.splits = dict[Any, int](), dict[Any, int](), 0
        """Step of the graph of gradients -> heads, or parts of one size; how often channels were viewed as heads."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {**dict(zip(_ARGUMENTS.get(func, ()), args, strict=False)), **(kwargs or {})}
        if func is F.glu:
            left, right = given["input"].chunk(2, given.get("dim", -1))
            return left * right.sigmoid()
        if func is F.instance_norm:  # to torch the channels of all samples are those of one
            x = given["input"].contiguous()
            means, variances = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
            return F.batch_norm(x, means, variances, given.get("weight"), given.get("bias"))
        if func is F.prelu and given["weight"].numel() == 1:
            return given["input"] * 1.0
        output = func(*args, **(kwargs or {}))
        if func in _SPLITS and output[0].grad_fn is not None:
            if len({part.shape for part in output}) == 1:
                self.parts[output[0].grad_fn] = len(output)
            return tuple(part * 1.0 for part in output)  # one step behind each, whoever uses it
        if func in _VIEWS and isinstance(args[0], Tensor) and args[0].ndim:
            before, after = args[0].shape, output.shape
            if after[: len(before) - 1] == before[:-1] and len(after) > len(before):
                self.splits += 1
                if output.grad_fn is not None:
                    self.heads[output.grad_fn] = after[-2]
        return output


_VIEWS = {Tensor.view, Tensor.reshape, Tensor.unflatten, torch.reshape, torch.unflatten}
_SPLITS = {Tensor.chunk, Tensor.split, torch.chunk, torch.split}
_ARGUMENTS = {
    F.glu: ("input", "dim"),
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    F.prelu: ("input", "weight"),
}
