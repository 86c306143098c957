"""Weights that a module of any class multiplies by, found by watching one run of it.

Whatever a module does with a weight: if it hands it, as it is, the other way round or slice by slice (the experts of a
mixture), to one of torch's linear operations, it is a matrix, whose rows the operation is given.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autocompress.model.hooks import Watch
from autocompress.nested import close, leaves
from autocompress.trial.matrix import Call, ConvolutionMatrix, Matrix, Weight

_ROWS, _IN, _OUT, _DOTS = string.ascii_lowercase, "I", "O", "STUVWXYZ"
"""Names of dimensions: of rows and groups, of what goes in, of what comes out, and of what three dots stand for."""


@dataclass(frozen=True)
class Handed(Weight):
    """name: of the weight in the module."""

    name: str

    def seen(self, call: Call) -> tuple[Matrix, Call] | None:
        """By the module run once more."""
        weight, found = call.module.get_parameter(self.name), list[_Use]()

        def see(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            if func in _OPERATIONS:
                found.extend(_OPERATIONS[func](weight, output, *args, **kwargs))

        try:
            with Watch(see):
                again = call.module(*call.args, **call.kwargs)
            if not found or not close(again, call.output):
                return None
            own = [parameter for parameter in call.module.parameters() if parameter.ndim == 1]
            return _Product.of(found, weight, own), call
        except Exception:  # whatever it does when it is run twice, or with what it multiplies by
            return None


def taken(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[nn.Parameter]:
    """The parameters that are given to `func`, or of which views are, if it is a linear operation."""
    if func in _OPERATIONS:
        for leaf in leaves((args, kwargs)):
            whole = leaf._base if isinstance(leaf, Tensor) and leaf._base is not None else leaf
            if isinstance(whole, nn.Parameter):
                yield whole


class _View(NamedTuple):
    """A weight, or one slice of it, with its last two dimensions as they are or exchanged. dims: those of the weight
    that the view's dimensions are."""

    slice: int | None
    dims: tuple[int, ...]


class _Use(NamedTuple):
    """Of a weight, in one operation. order: its dimensions, of groups, then of outputs, then of `inputs` inputs. rows,
    outputs: float [groups, rows, inputs] and [groups, rows, outputs], of the slice or of all."""

    slice: int | None
    order: tuple[int, ...]
    inputs: int
    rows: Tensor
    outputs: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Product(Matrix):
    """Of a run that is over. parts: rows and their outputs, slice by slice."""

    order: tuple[int, ...]
    inputs: int
    parts: Sequence[tuple[Tensor, Tensor]]
    added: Tensor | None
    routed: bool

    @classmethod
    def of(cls, uses: Sequence[_Use], weight: Tensor, own: Sequence[Tensor]) -> _Product:
        """own: vectors of the module, one of which a bias has to be. Raises ValueError if the uses are not alike."""
        if len({(use.order, use.inputs, use.slice is None) for use in uses}) > 1:
            raise ValueError("it is a matrix in more than one way")
        first, parts = uses[0], list[tuple[Tensor, Tensor]]()
        for at in [None] if first.slice is None else range(len(weight)):
            alike = [use for use in uses if use.slice == at]
            pairs = [(use.rows, use.outputs) for use in alike] or [(first.rows[:, :0], first.outputs[:, :0])]
            rows, outputs = zip(*pairs, strict=True)
            parts.append((torch.cat(rows, 1), torch.cat(outputs, 1)))
        added = first.bias if all(use.bias is first.bias for use in uses) else None
        known = any(added is parameter for parameter in own)
        return cls(first.order, first.inputs, parts, added if known else None, first.slice is not None)

    def rows(self, call: Call) -> list[Tensor]:
        return [rows for rows, _ in self.parts]

    def outputs(self, call: Call) -> list[Tensor]:
        return [outputs for _, outputs in self.parts]

    def bias(self, module: Any) -> Tensor | None:
        return self.added

    def grouped(self, weight: Tensor, groups: int) -> Tensor:
        ordered = weight.permute(self.order)
        return ordered.reshape(groups, -1, math.prod(ordered.shape[-self.inputs :]))

    def restored(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        back = [self.order.index(dim) for dim in range(len(shape))]
        return grouped.reshape([shape[dim] for dim in self.order]).permute(back).contiguous()


def _view(operand: Any, weight: Tensor) -> _View | None:
    """None if it is none."""
    if operand is weight:
        return _View(None, tuple(range(weight.ndim)))
    if not isinstance(operand, Tensor) or operand._base is not weight or operand.ndim < 2:
        return None
    dims, place = tuple(range(weight.ndim)), None
    if operand.ndim == weight.ndim - 1:
        dims, place = dims[1:], (operand.storage_offset() - weight.storage_offset()) // weight.stride(0)
    for order in (dims, (*dims[:-2], dims[-1], dims[-2])):
        same = [weight.shape[dim] for dim in order], [weight.stride(dim) for dim in order]
        if ([*operand.shape], [*operand.stride()]) == same:
            return _View(place, order)
    return None


def _uses(
    weight: Tensor, operand: Any, x: Tensor, y: Tensor, names: tuple[str, str, str], bias: Any = None
) -> Iterator[_Use]:
    """names: of the dimensions of the operand, of what it multiplies and of what comes out. Raises ValueError if it is
    no product of matrices."""
    view = _view(operand, weight)
    if view is None:
        return
    own, given, out = names
    groups = [n for n in own if n in given and n in out]
    outputs, inputs = [n for n in own if n not in given], [n for n in own if n not in out]
    rows = [n for n in given if n not in own]
    parts = (own, groups + outputs + inputs), (given, groups + rows + inputs), (out, groups + rows + outputs)
    sizes = {*zip(own, operand.shape, strict=True), *zip(given, x.shape, strict=True), *zip(out, y.shape, strict=True)}
    if any(sorted(part) != sorted(dims) for part, dims in parts) or len(sizes) > len(dict(sizes)):
        raise ValueError("it is no product of matrices")
    order = tuple(view.dims[own.index(n)] for n in groups + outputs + inputs)

    def arranged(value: Tensor, by: str, last: Sequence[str]) -> Tensor:
        ordered = value.permute([by.index(n) for n in [*groups, *rows, *last]])
        ends = len(groups), len(groups) + len(rows)
        shape = ordered.shape
        return ordered.reshape(shape[: ends[0]].numel(), shape[ends[0] : ends[1]].numel(), shape[ends[1] :].numel())

    whole = order if view.slice is None else (0, *order)
    yield _Use(view.slice, whole, len(inputs), arranged(x, given, inputs), arranged(y, out, outputs), bias)


def _linear(weight: Tensor, output: Tensor, input: Tensor, w: Tensor, bias: Tensor | None = None) -> Iterator[_Use]:
    rows = _ROWS[: input.ndim - 1]
    return _uses(weight, w, input, output, (_OUT + _IN, rows + _IN, rows + _OUT), bias)


def _matmul(weight: Tensor, output: Tensor, input: Tensor, other: Tensor) -> Iterator[_Use]:
    """Of either operand, as if the other one had as many dimensions as come out."""
    if input.ndim == 1:
        input, output = input[None], output.unsqueeze(-2)
    if other.ndim == 1:
        other, output = other[:, None], output[..., None]
    many = output.shape[:-2]
    batch = _ROWS[: len(many)]
    left, right = (batch[len(many) + 2 - each.ndim :] for each in (input, other))
    x, y = (each.expand(*many, *each.shape[-2:]) for each in (input, other))
    yield from _uses(weight, other, x, output, (right + _IN + _OUT, batch + "z" + _IN, batch + "z" + _OUT))
    yield from _uses(weight, input, y, output, (left + _OUT + _IN, batch + _IN + "z", batch + _OUT + "z"))


def _mm(weight: Tensor, output: Tensor, input: Tensor, mat2: Tensor) -> Iterator[_Use]:
    return _matmul(weight, output, input, mat2)


def _addmm(weight: Tensor, output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor) -> Iterator[_Use]:
    return (use._replace(bias=input) for use in _matmul(weight, output, mat1, mat2))


def _grouped_mm(weight: Tensor, output: Tensor, input: Tensor, mat2: Tensor, offs: Tensor, **_: Any) -> Iterator[_Use]:
    """Rows lie in the order of the slices that they go to."""
    view = _view(mat2, weight)
    if view is not None:
        first, inputs, outputs = view.dims
        for at, (start, end) in enumerate(itertools.pairwise([0, *offs.tolist()])):
            yield _Use(at, (first, outputs, inputs), 1, input[None, start:end], output[None, start:end])


def _einsum(weight: Tensor, output: Tensor, equation: str, *operands: Any) -> Iterator[_Use]:
    first, second = operands
    names, out = equation.replace(" ", "").split("->")
    left, right = map(_spelled, names.split(","), (first, second))
    out = _spelled(out, output)
    yield from _uses(weight, second, first, output, (right, left, out))
    yield from _uses(weight, first, second, output, (left, right, out))


def _spelled(names: str, value: Tensor) -> str:
    """With a name for each dimension that the dots stand for."""
    return names.replace("...", _DOTS[len(_DOTS) - (value.ndim - len(names) + 3) :])


def _convolution(kind: Any) -> Callable[..., Iterator[_Use]]:
    def uses(
        weight: Tensor, output: Tensor, input: Tensor, w: Tensor, bias: Any = None, *settings: Any, **named: Any
    ) -> Iterator[_Use]:
        """By a module that does the same."""
        if w is weight:
            names = ("stride", "padding", "dilation", "groups")
            named = {**named, **dict(zip(names, settings, strict=False))}
            conv = kind(w.shape[1] * named.get("groups", 1), len(w), w.shape[2:], device="meta", **named)
            call, matrix = Call(conv, (input,), {}, output), ConvolutionMatrix()
            (rows,), (outputs,) = matrix.rows(call), matrix.outputs(call)
            yield _Use(None, tuple(range(w.ndim)), w.ndim - 1, rows, outputs, bias)

    return uses


_OPERATIONS: dict[Any, Callable[..., Iterator[_Use]]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.conv1d: _convolution(nn.Conv1d),
    torch.nn.functional.conv2d: _convolution(nn.Conv2d),
    torch.nn.functional.conv3d: _convolution(nn.Conv3d),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), _mm),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    torch.einsum: _einsum,
    getattr(torch, "_grouped_mm", None): _grouped_mm,  # none before torch 2.7
}
