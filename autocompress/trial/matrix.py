"""A weight as a matrix: the rows that it multiplies when the model runs, and the outputs that come of them.

Linear layers, and convolutions of any dimension and number of groups, whose rows are their windows (im2col, Chellapilla
et al., 2006).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

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
        """The matrix that it is in a run of its module, and the run to ask it about. None if it is no matrix."""


class Matrix(Weight):
    """A weight [outputs, ...] that falls into groups of equally many outputs; each group multiplies rows of its own.

    Rows and their outputs come as one tensor or more, each for the next groups that see equally many rows:
    float [groups, rows, inputs] and [groups, rows, outputs of a group].
    """

    routed = False
    """Whether the model itself chooses which rows it is given (as a mixture does for its experts)."""

    def seen(self, call: Call) -> tuple[Matrix, Call] | None:
        return self, call

    @abstractmethod
    def rows(self, call: Call) -> list[Tensor]: ...

    @abstractmethod
    def outputs(self, call: Call) -> list[Tensor]: ...

    @abstractmethod
    def bias(self, module: Any) -> Tensor | None:
        """[outputs], what is added to the outputs of the matrix; itself, not a copy."""

    def grouped(self, weight: Tensor, groups: int) -> Tensor:
        """[groups, outputs of a group, inputs]."""
        return weight.reshape(groups, -1, weight[0].numel())

    def restored(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight, of that shape, that `grouped` was made of."""
        return grouped.reshape(*shape)


class LinearMatrix(Matrix):
    def rows(self, call: Call) -> list[Tensor]:
        return [flat(input_of(*call.args, **call.kwargs))]

    def outputs(self, call: Call) -> list[Tensor]:
        return [flat(call.output)]

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = module.bias
        return bias


class ConvolutionMatrix(LinearMatrix):
    def rows(self, call: Call) -> list[Tensor]:
        conv, x = call.module, _batched(call.module, input_of(*call.args, **call.kwargs))
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = pad(x, conv._reversed_padding_repeated_twice, mode)
        return [_by_group(conv, _windows(x, conv.kernel_size, conv.dilation, conv.stride))]

    def outputs(self, call: Call) -> list[Tensor]:
        return [_by_group(call.module, _batched(call.module, call.output))]


class TransposedMatrix(ConvolutionMatrix):
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


def input_of(input: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of a layer or a norm: its first argument."""
    return input


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


def flat(x: Tensor) -> Tensor:
    """[1, rows, features]: one group."""
    return x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
