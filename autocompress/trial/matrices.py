"""The weights of a model as matrices, by the modules that run them.

Linear layers and convolutions; what computes with its weights itself: `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells;
and modules of any other class, as `Handed` finds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from autocompress.nested import leaves, map_leaves
from autocompress.trial.handed import Handed
from autocompress.trial.matrix import Call, ConvolutionMatrix, LinearMatrix, Matrix, TransposedMatrix, Weight, flat


def matrices(model: nn.Module) -> dict[tuple[nn.Module, str], tuple[nn.Module, Weight]]:
    """(module, attribute) of each weight that is one, as far as is known before it runs -> (the module that runs
    it, what it is)."""
    out: dict[tuple[nn.Module, str], tuple[nn.Module, Weight]] = {}
    for module in model.modules():
        for (owner, attribute), matrix in _of(module):
            out.setdefault((owner, attribute), (module, matrix))
    return out


def _of(module: Any) -> Iterator[tuple[tuple[nn.Module, str], Weight]]:
    """(module, attribute) of each weight, and what it is when `module` runs."""
    if runs_as(module, nn.Linear):
        yield (module, "weight"), LinearMatrix()
    elif runs_as(module, nn.RNN, nn.LSTM, nn.GRU) and not module.proj_size:
        ways = (False, True) if module.bidirectional else (False,)
        for part, layer, reverse in product(("ih", "hh"), range(module.num_layers), ways):
            matrix = _Recurrent(part, layer, reverse)
            yield (module, f"weight_{matrix.name}"), matrix
    elif runs_as(module, nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        for part in ("ih", "hh"):
            yield (module, f"weight_{part}"), _Cell(part)
    elif runs_as(module, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        yield (module, "weight"), ConvolutionMatrix()
    elif runs_as(module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        yield (module, "weight"), TransposedMatrix()
    elif not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                yield (module, attribute), Handed(attribute)


def runs_as(module: Any, *kinds: Any) -> bool:
    """Whether it is one of them, and runs as they do."""
    own = type(module)
    return any(
        own.forward is kind.forward and getattr(own, "_conv_forward", 0) is getattr(kind, "_conv_forward", 0)
        for kind in kinds
    )


@dataclass(frozen=True)
class _Cell(Matrix):
    """Of one step. part: it multiplies what the cell is given ("ih") or its output one step before ("hh")."""

    part: str

    @property
    def name(self) -> str:
        return self.part

    def rows(self, call: Call) -> list[Tensor]:
        x, start = _sequence(*call.args, **call.kwargs)
        before = torch.zeros_like(next(leaves(call.output))) if start is None else next(leaves(start))
        return [flat(x if self.part == "ih" else before)]

    def outputs(self, call: Call) -> list[Tensor]:
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
            x = _output(rnn, layer, x, start)
        if self.part == "ih":
            return [flat(x.data)]
        steps = _steps(rnn, _output(rnn, self.layer, x, start), self.reverse)
        first = torch.zeros_like(steps[0])
        if start is not None:
            first = next(leaves(start))[_layers(rnn, self.layer)][int(self.reverse)].reshape(first.shape)
            if isinstance(x, PackedSequence) and x.sorted_indices is not None:
                first = first[x.sorted_indices]
        before = [*steps[1:], first[:0]] if self.reverse else [first, *steps[:-1]]
        states = [(b[: len(s)], first[len(b) : len(s)]) for b, s in zip(before, steps, strict=True)]
        return [flat(torch.cat([part for parts in states for part in parts]))]


def _layers(rnn: Any, layer: int) -> slice:
    """Where the directions of a layer are, of all."""
    directions = 1 + rnn.bidirectional
    return slice(layer * directions, (layer + 1) * directions)


def _output(rnn: Any, layer: int, x: Any, start: Any) -> Any:
    """Of one layer, a tensor or a `PackedSequence`."""
    alone, here = copy.copy(rnn), _layers(rnn, layer)
    weights = [getattr(rnn, name) for names in rnn._all_weights[here] for name in names]
    vars(alone).update(num_layers=1, input_size=x.data.shape[-1], _flat_weights=weights)
    return type(rnn).forward(alone, x, map_leaves(start, lambda state: None if state is None else state[here]))[0]


def _steps(rnn: Any, output: Any, reverse: bool) -> Sequence[Tensor]:
    """[sequences, hidden] of every step, of one direction; sequences that have ended are the last."""
    values: Tensor = output.data.chunk(1 + rnn.bidirectional, -1)[reverse]
    if isinstance(output, PackedSequence):
        return torch.split(values, output.batch_sizes.tolist())
    return values[:, None].unbind(0) if values.ndim == 2 else values.unbind(1 if rnn.batch_first else 0)


def _sequence(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx
