"""Weights as matrices: the rows that each multiplies when the model runs, and what it says of them.

Linear layers; convolutions of any dimension and number of groups, whose rows are their windows (im2col, Chellapilla et
al., 2006); what computes with its weights itself: `nn.MultiheadAttention`, `nn.RNN`, `nn.LSTM`, `nn.GRU` and their
cells; and modules with a forward of their own that hands a weight to one of torch's linear operations or products.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.utils.rnn import PackedSequence

from autocompress.hooks import Watch
from autocompress.nested import close, leaves, map_leaves

MOST_ROWS = 16_384
"""That a layer is fitted to; of a convolution, many of whose windows are alike, no more in one run."""
_MOST_VALUES = 1 << 25
"""Of the rows of a convolution, of all its groups, in one run."""


class Call(NamedTuple):
    """A run of a module: what went into it and what came out."""

    module: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any


class Weight(ABC):
    """One that may be a matrix."""

    @abstractmethod
    def seen(self, call: Call) -> tuple[Matrix, Call] | None:
        """What it is in a run of its module, and the run as that can tell of it. None if it is no matrix."""


class Matrix(Weight):
    """A weight [outputs, ...] that falls into groups of equally many outputs; each group multiplies rows of its own.

    Rows, and what is said of them, come as one tensor or more, each for the next groups that see equally many rows:
    float [groups, rows, inputs] and [groups, rows, outputs of a group].
    """

    def seen(self, call: Call) -> tuple[Matrix, Call] | None:
        return self, call

    @abstractmethod
    def rows(self, call: Call) -> list[Tensor]: ...

    @abstractmethod
    def says(self, call: Call) -> list[Tensor]: ...

    @abstractmethod
    def bias(self, module: Any) -> Tensor | None:
        """[outputs], what is added to what the matrix says; itself, not a copy."""

    def grouped(self, weight: Tensor, groups: int) -> Tensor:
        """[groups, outputs of a group, inputs]."""
        return weight.reshape(groups, -1, weight[0].numel())

    def restored(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight, of that shape, that `grouped` was made of."""
        return grouped.reshape(*shape)


def matrices(model: nn.Module) -> dict[tuple[nn.Module, str], tuple[nn.Module, Weight]]:
    """(module, attribute) of each weight that is one, as far as can be told before it runs -> (the module whose runs
    tell, what it is)."""
    out: dict[tuple[nn.Module, str], tuple[nn.Module, Weight]] = {}
    for module in model.modules():
        for (owner, attribute), matrix in _of(module):
            out.setdefault((owner, attribute), (module, matrix))
    return out


def _of(module: Any) -> Iterator[tuple[tuple[nn.Module, str], Weight]]:
    """(module, attribute) of each weight, and what it is when `module` runs."""
    if runs_as(module, nn.MultiheadAttention):
        packed = {"in_proj_weight": (0, 1, 2), "q_proj_weight": (0,), "k_proj_weight": (1,), "v_proj_weight": (2,)}
        for attribute, parts in packed.items():
            yield (module, attribute), _IntoAttention(attribute, parts)
        yield (module.out_proj, "weight"), _OutOfAttention()
    elif runs_as(module, nn.Linear):
        yield (module, "weight"), _Linear()
    elif runs_as(module, nn.RNN, nn.LSTM, nn.GRU) and not module.proj_size:
        ways = (False, True) if module.bidirectional else (False,)
        for part, layer, reverse in product(("ih", "hh"), range(module.num_layers), ways):
            matrix = _Recurrent(part, layer, reverse)
            yield (module, f"weight_{matrix.name}"), matrix
    elif runs_as(module, nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        for part in ("ih", "hh"):
            yield (module, f"weight_{part}"), _Cell(part)
    elif runs_as(module, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        yield (module, "weight"), _Convolution()
    elif runs_as(module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        yield (module, "weight"), _Transposed()
    elif not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not any(map(_has_weights, module.children())):
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                yield (module, attribute), Handed(attribute)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def runs_as(module: Any, *kinds: Any) -> bool:
    """Whether it is one of them, and runs as they do."""
    own = type(module)
    return any(
        own.forward is kind.forward and getattr(own, "_conv_forward", 0) is getattr(kind, "_conv_forward", 0)
        for kind in kinds
    )


class _Linear(Matrix):
    def rows(self, call: Call) -> list[Tensor]:
        return [_flat(input_of(*call.args, **call.kwargs))]

    def says(self, call: Call) -> list[Tensor]:
        return [_flat(call.output)]

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = module.bias
        return bias


class _Convolution(_Linear):
    def rows(self, call: Call) -> list[Tensor]:
        conv, x = call.module, _batched(call.module, input_of(*call.args, **call.kwargs))
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = pad(x, conv._reversed_padding_repeated_twice, mode)
        return [_by_group(conv, _windows(x, conv.kernel_size, conv.dilation, conv.stride))]

    def says(self, call: Call) -> list[Tensor]:
        return [_by_group(call.module, _batched(call.module, call.output))]


class _Transposed(_Convolution):
    """Windows of the input with zeros in between, as the convolution sees them that does the same with the kernel the
    other way round. Its weight is [inputs, outputs of a group, *kernel]."""

    def rows(self, call: Call) -> list[Tensor]:
        conv, x = call.module, _batched(call.module, input_of(*call.args, **call.kwargs))
        wide = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], conv.stride, strict=True)]
        apart, padding = x.new_zeros(*x.shape[:2], *wide), list[int]()
        apart[(slice(None), slice(None), *(slice(None, None, stride) for stride in conv.stride))] = x
        places = _batched(conv, call.output).shape[2:]
        settings = zip(places, wide, conv.kernel_size, conv.dilation, conv.padding, strict=True)
        for out, n, kernel, dilation, cut in settings:
            padding = [(kernel - 1) * dilation - cut, out + cut - n, *padding]
        windows = _windows(pad(apart, padding), conv.kernel_size, conv.dilation, [1] * len(conv.stride))
        return [_by_group(conv, windows.flip(list(range(x.ndim, windows.ndim))))]

    def grouped(self, weight: Tensor, groups: int) -> Tensor:
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2)

    def restored(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        inputs = shape[0] // len(grouped)
        return grouped.reshape(len(grouped), shape[1], inputs, *shape[2:]).transpose(1, 2).reshape(*shape)


class _Factor(_Linear):
    """[*groups, inputs, outputs]: its rows stand before it in a product."""

    def rows(self, call: Call) -> list[Tensor]:
        x = input_of(*call.args)
        return [_by_factor(x.expand(*call.output.shape[:-1], x.shape[-1]), call.module.weight)]

    def says(self, call: Call) -> list[Tensor]:
        return [_by_factor(call.output, call.module.weight)]

    def grouped(self, weight: Tensor, groups: int) -> Tensor:
        return weight.reshape(groups, *weight.shape[-2:]).mT

    def restored(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        return grouped.mT.reshape(*shape)


@dataclass(frozen=True)
class Handed(Weight):
    """Of a module with a forward of its own, which may do anything with the weight. If a run hands it once to an
    operation that multiplies by it (as convolutions that pad as TensorFlow's do, or experts that share a tensor), that
    is what it is. name: in the module."""

    name: str

    def seen(self, call: Call) -> tuple[Matrix, Call] | None:
        """By the module run once more, in which the operation is taken for one of torch's modules."""
        weight, found = call.module.get_parameter(self.name), list[tuple[Matrix, Call]]()

        def see(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            if func in _OPERATIONS:
                operands, kind = _OPERATIONS[func]
                given = operands(*args, **kwargs)
                if _is(given.weight, weight):
                    found.append(_as_module(kind, given, weight, [*call.module.parameters()], output))

        try:
            with Watch(see):
                again = call.module(*call.args, **call.kwargs)
            return found[0] if len(found) == 1 and close(again, call.output) else None
        except Exception:  # whatever it does when it is run twice
            return None


class _Operands(NamedTuple):
    """What torch's linear operations are given."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


def _product(input: Tensor, other: Tensor) -> _Operands:
    return _Operands(input, other)


def _product_of_matrices(input: Tensor, mat2: Tensor) -> _Operands:
    return _Operands(input, mat2)


def _sum_of_product(input: Tensor, mat1: Tensor, mat2: Tensor) -> _Operands:
    return _Operands(mat1, mat2, input)


_OPERATIONS: dict[Any, tuple[Callable[..., _Operands], Any]] = {
    torch.nn.functional.linear: (_Operands, nn.Linear),
    torch.nn.functional.conv1d: (_Operands, nn.Conv1d),
    torch.nn.functional.conv2d: (_Operands, nn.Conv2d),
    torch.nn.functional.conv3d: (_Operands, nn.Conv3d),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (_product, None)),
    **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), (_product_of_matrices, None)),
    **dict.fromkeys((torch.addmm, Tensor.addmm), (_sum_of_product, None)),
}
"""What they are given, by their arguments, and the module that does the same; None for a product."""


def _is(operand: Any, weight: Tensor) -> bool:
    """Whether it is the weight, as it is or, of two dimensions, the other way round."""
    turned = weight.ndim == 2 and operand._base is weight and operand.shape == weight.mT.shape
    return operand is weight or (turned and operand.stride() == weight.mT.stride())


def _as_module(
    kind: Any, given: _Operands, weight: Tensor, own: Sequence[Tensor], output: Tensor
) -> tuple[Matrix, Call]:
    """The run of an operation as one of a module that has the weight, and the bias if that is among its `own`."""
    shape, matrix, module = weight.shape, _Linear(), nn.Module()
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        matrix, module = _Convolution(), kind(shape[1] * given.groups, shape[0], shape[2:], *given[3:], device="meta")
    elif (given.weight is weight) == (kind is None):
        matrix = _Factor()
        assert output.shape[-weight.ndim : -2] == shape[:-2]
    known = given.bias is not None and given.bias.ndim == 1 and any(given.bias is parameter for parameter in own)
    vars(module).update(weight=weight, bias=given.bias if known else None)
    return matrix, Call(module, (given.input,), {}, output)


@dataclass(frozen=True)
class _IntoAttention(Matrix):
    """attribute: of the attention. parts: of its inputs (query, key, value), which this one multiplies."""

    attribute: str
    parts: Sequence[int]

    def rows(self, call: Call) -> list[Tensor]:
        query, key, value = inputs = _inputs(*call.args, **call.kwargs)
        return [_flat(query)] if query is key is value else [_flat(inputs[part]) for part in self.parts]

    def says(self, call: Call) -> list[Tensor]:
        rows, weight, bias = self.rows(call), getattr(call.module, self.attribute), self.bias(call.module)
        biases = [None] * len(rows) if bias is None else bias.chunk(len(rows))
        return [linear(x, w, b) for x, w, b in zip(rows, weight.chunk(len(rows)), biases, strict=True)]

    def bias(self, module: Any) -> Tensor | None:
        if module.in_proj_bias is None:
            return None
        width = module.embed_dim
        bias: Tensor = module.in_proj_bias[width * self.parts[0] : width * (self.parts[-1] + 1)]
        return bias


class _OutOfAttention(Matrix):
    def rows(self, call: Call) -> list[Tensor]:
        """What the heads give: the output of an attention whose last projection changes nothing."""
        bare, last = copy.copy(call.module), copy.copy(call.module.out_proj)
        eye = torch.eye(bare.embed_dim, dtype=last.weight.dtype, device=last.weight.device)
        vars(last)["_parameters"] = {"weight": eye, "bias": torch.zeros_like(eye[0])}
        vars(bare)["_modules"] = {"out_proj": last}
        return [_flat(type(bare).forward(bare, *call.args, **call.kwargs)[0])]

    def says(self, call: Call) -> list[Tensor]:
        return [_flat(call.output[0])]

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = module.out_proj.bias
        return bias


@dataclass(frozen=True)
class _Cell(Matrix):
    """Of one step. part: it multiplies what the cell is given ("ih") or what it said one step before ("hh")."""

    part: str

    @property
    def name(self) -> str:
        return self.part

    def rows(self, call: Call) -> list[Tensor]:
        x, start = _sequence(*call.args, **call.kwargs)
        before = torch.zeros_like(next(leaves(call.output))) if start is None else next(leaves(start))
        return [_flat(x if self.part == "ih" else before)]

    def says(self, call: Call) -> list[Tensor]:
        weight = getattr(call.module, f"weight_{self.name}")
        return [linear(x, weight, self.bias(call.module)) for x in self.rows(call)]

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = getattr(module, f"bias_{self.name}", None)
        return bias


@dataclass(frozen=True)
class _Recurrent(_Cell):
    """Of a layer of an `nn.RNN`, `nn.LSTM` or `nn.GRU`. reverse: from the last step on."""

    layer: int
    reverse: bool

    @property
    def name(self) -> str:
        return f"{self.part}_l{self.layer}{'_reverse' * self.reverse}"

    def rows(self, call: Call) -> list[Tensor]:
        rnn, (x, start) = call.module, _sequence(*call.args, **call.kwargs)
        for layer in range(self.layer):
            x = _said(rnn, layer, x, start)
        if self.part == "ih":
            return [_flat(x.data)]
        steps = _steps(rnn, _said(rnn, self.layer, x, start), self.reverse)
        first = torch.zeros_like(steps[0])
        if start is not None:
            first = next(leaves(start))[_layers(rnn, self.layer)][int(self.reverse)].reshape(first.shape)
            if isinstance(x, PackedSequence) and x.sorted_indices is not None:
                first = first[x.sorted_indices]
        before = [*steps[1:], first[:0]] if self.reverse else [first, *steps[:-1]]
        said = [(b[: len(s)], first[len(b) : len(s)]) for b, s in zip(before, steps, strict=True)]
        return [_flat(torch.cat([part for parts in said for part in parts]))]


def _layers(rnn: Any, layer: int) -> slice:
    """Where the directions of a layer are, of all."""
    directions = 1 + rnn.bidirectional
    return slice(layer * directions, (layer + 1) * directions)


def _said(rnn: Any, layer: int, x: Any, start: Any) -> Any:
    """What one layer says of its inputs, a tensor or a `PackedSequence`."""
    alone, here = copy.copy(rnn), _layers(rnn, layer)
    weights = [getattr(rnn, name) for names in rnn._all_weights[here] for name in names]
    vars(alone).update(num_layers=1, input_size=x.data.shape[-1], _flat_weights=weights)
    return type(rnn).forward(alone, x, map_leaves(start, lambda state: None if state is None else state[here]))[0]


def _steps(rnn: Any, said: Any, reverse: bool) -> Sequence[Tensor]:
    """[sequences, hidden] of every step, of one direction; sequences that have ended are the last."""
    values: Tensor = said.data.chunk(1 + rnn.bidirectional, -1)[reverse]
    if isinstance(said, PackedSequence):
        return torch.split(values, said.batch_sizes.tolist())
    return values[:, None].unbind(0) if values.ndim == 2 else values.unbind(1 if rnn.batch_first else 0)


def input_of(input: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of a layer or a norm: its first argument."""
    return input


def _inputs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def _sequence(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


def _by_factor(x: Tensor, weight: Tensor) -> Tensor:
    """[..., *groups, n, features] -> [groups, rows, features]."""
    if weight.ndim == 2:
        return _flat(x)
    return x.reshape(-1, weight.shape[:-2].numel(), *x.shape[-2:]).transpose(0, 1).flatten(1, 2)


def _batched(conv: Any, x: Tensor) -> Tensor:
    """With samples first, if it is of one alone."""
    return x if x.ndim == conv.weight.ndim else x[None]


def _windows(x: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """[N, channels, *places, *kernel]."""
    for at, (size, apart, step) in enumerate(zip(kernel, dilation, stride, strict=True), 2):
        x = x.unfold(at, (size - 1) * apart + 1, step)[..., ::apart]
    return x


def by_place(x: Tensor, places: int, most: int = MOST_ROWS) -> Tensor:
    """[N, channels, *places, ...] -> [rows, channels, ...], at most so many, which are drawn at random, but always the
    same of as many. places: the number of these dimensions."""
    shape = x.shape[:1] + x.shape[2 : 2 + places]
    drawn = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(0))[:most].sort().values
    return x.movedim(1, 1 + places)[torch.unravel_index(drawn.to(x.device), shape)]


def _by_group(conv: Any, x: Tensor) -> Tensor:
    """[N, channels, *places, ...] -> [groups, rows, channels of a group * ...]."""
    most = min(MOST_ROWS, max(1, _MOST_VALUES // (conv.in_channels * math.prod(conv.kernel_size))))
    x = by_place(x, conv.weight.ndim - 2, most)
    return x.reshape(len(x), conv.groups, x[:1].numel() // conv.groups).transpose(0, 1).contiguous()


def _flat(x: Tensor) -> Tensor:
    """[1, rows, features]: one group."""
    return x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
