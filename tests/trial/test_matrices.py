"""Weights as matrices: the outputs of a layer are its matrix times its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.utils import rnn as rnn_utils

from autocompress.trial.matrices import matrices
from autocompress.trial.matrix import MOST_ROWS, Call, Matrix, Weight


def calls_of(model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Call:
    """Inputs and outputs of `module` when `model` ran."""
    calls: list[Call] = []
    handle = module.register_forward_hook(lambda *call: calls.append(Call(*call)), with_kwargs=True)
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    (call,) = calls
    return call


def seen(weight: Weight, call: Call) -> tuple[Matrix, Call]:
    found = weight.seen(call)
    assert found is not None
    return found


def products(call: Call, matrix: Matrix, weight: Tensor) -> list[Tensor]:
    """The outputs of the matrix, by its rows: group by group, one output after the other."""
    rows, bias = matrix.rows(call), matrix.bias(call.module)
    weights = matrix.grouped(weight, sum(map(len, rows)))
    assert torch.equal(matrix.restored(weights, weight.shape), weight)
    biases = [torch.zeros(len(w)) for w in weights] if bias is None else bias.chunk(len(weights))
    groups = zip([group for part in rows for group in part], weights, biases, strict=True)
    return [x @ w.T + b for x, w, b in groups]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 0), bias=False),
        nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(3, 5, 4, padding="same", padding_mode="circular"),
        nn.Conv2d(6, 8, 3, groups=2, stride=2),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2),
        nn.Conv1d(4, 6, 3, groups=2, bias=False),
        nn.Conv3d(4, 6, (1, 3, 2), padding=1, groups=2, dilation=(1, 2, 1)),
        nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, padding=4, dilation=2, output_padding=1, bias=False),
        nn.ConvTranspose2d(3, 5, 2, 2),
        nn.ConvTranspose2d(6, 6, (3, 4), stride=(1, 2), padding=(0, 1), groups=6),
        nn.ConvTranspose3d(4, 2, (1, 3, 2), padding=(0, 1, 0), stride=(2, 1, 1)),
        nn.Linear(9, 5),
        nn.Linear(9, 5, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_is_its_matrix_times_its_rows(layer: Any, batched: bool) -> None:
    places = (6,) if isinstance(layer, nn.Linear) else (3, 8, 9)[5 - layer.weight.ndim :]
    shape = (6, 9) if isinstance(layer, nn.Linear) else (layer.in_channels, *places)
    call = calls_of(layer, layer, torch.randn((2, *shape) if batched else shape))
    ((module, weight),) = matrices(layer).values()
    assert module is layer
    matrix, call = seen(weight, call)
    outputs = [group for part in matrix.outputs(call) for group in part]
    torch.testing.assert_close(products(call, matrix, layer.weight), outputs)
    every = call.output if isinstance(layer, nn.Linear) else call.output.movedim(-layer.weight.ndim + 1, -1)
    torch.testing.assert_close(torch.cat(outputs, 1).view(every.shape), every)


def test_of_many_windows_some_are_drawn() -> None:
    layer = nn.Conv2d(3, 4, 3)
    call = calls_of(layer, layer, torch.randn(10, 3, 52, 52))
    ((_, weight),) = matrices(layer).values()
    matrix, call = seen(weight, call)
    (outputs,) = matrix.outputs(call)[0]
    assert outputs.shape == (MOST_ROWS, 4)
    torch.testing.assert_close(products(call, matrix, layer.weight), [outputs])
    rest = call.output.movedim(1, -1).reshape(-1, 4).double()
    torch.testing.assert_close(outputs.double().mean(0), rest.mean(0), rtol=0.1, atol=0.02)


def by_cells(rnn: Any, layer: int, suffix: str, sequences: list[Tensor], starts: list[Tensor]) -> list[list[Tensor]]:
    """Of one direction of a layer, by torch's cell of one step: the hidden states before each step of each sequence
    [T, inputs], and those after it. starts: [1, hidden] of each."""
    cell = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}[type(rnn)](sequences[0].shape[1], 6)
    cell.load_state_dict({n: getattr(rnn, f"{n}_l{layer}{suffix}") for n, _ in cell.named_parameters()})
    found: list[list[Tensor]] = [[], []]
    for x, h in zip(sequences, starts, strict=True):
        state: Any = (h, h) if isinstance(rnn, nn.LSTM) else h
        states = [h]
        for step in x.flip(0) if suffix else x:
            state = cell(step[None], state)
            states.append(state[0] if isinstance(rnn, nn.LSTM) else state)
        for known, part in zip(found, (states[:-1], states[1:]), strict=True):
            known.append(torch.cat(part[::-1] if suffix else part))
    return found


@pytest.mark.parametrize("given", ["tensor", "packed", "with states", "packed, with states"])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True, "num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_multiply_what_they_are_given_and_what_they_said_a_step_before(
    kind: Any, settings: Any, given: str
) -> None:
    torch.manual_seed(0)
    rnn, first = kind(5, 6, **settings), settings.get("batch_first", False)
    ways = ["", "_reverse"] if rnn.bidirectional else [""]
    sequences = [torch.randn(n, 5) for n in ((3, 7, 5) if "packed" in given else (4, 4, 4))]
    together = rnn_utils.pad_sequence(sequences, first)
    args: list[Any] = [together]
    if "packed" in given:
        args = [rnn_utils.pack_padded_sequence(together, torch.tensor([3, 7, 5]), first, enforce_sorted=False)]
    h = torch.randn(rnn.num_layers * len(ways), 3, 6) if "states" in given else None
    if h is not None:
        args.append((h, h) if kind is nn.LSTM else h)
    call = calls_of(rnn, rnn, *args)
    known = {name: seen(weight, call)[0] for (_, name), (_, weight) in matrices(rnn).items()}
    with torch.no_grad():
        for layer in range(rnn.num_layers):
            after = []
            for at, way in enumerate(ways):
                starts = torch.zeros(3, 1, 6) if h is None else h[layer * len(ways) + at][:, None]
                before, outputs = by_cells(rnn, layer, way, sequences, list(starts))
                after.append(outputs)
                for part, expected in (("ih", sequences), ("hh", before)):
                    matrix, weight = known[f"weight_{part}_l{layer}{way}"], getattr(rnn, f"weight_{part}_l{layer}{way}")
                    torch.testing.assert_close(products(call, matrix, weight), [matrix.outputs(call)[0][0]])
                    (rows,), wanted = matrix.rows(call)[0], torch.cat(expected)
                    assert rows.shape == wanted.shape
                    torch.testing.assert_close(rows.T @ rows, wanted.T @ wanted)  # in any order
            sequences = [torch.cat(parts, 1) for parts in zip(*after, strict=True)]


@pytest.mark.parametrize("cell", [nn.RNNCell(5, 6), nn.LSTMCell(5, 6), nn.GRUCell(5, 6)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "sample"])
def test_cells_are_matrices_that_multiply_what_they_are_given_and_their_state(
    cell: Any, given: bool, batched: bool
) -> None:
    x, h = (torch.randn(3, 5), torch.randn(3, 6)) if batched else (torch.randn(5), torch.randn(6))
    state = ((h, torch.randn_like(h)) if isinstance(cell, nn.LSTMCell) else h) if given else None
    call = calls_of(cell, cell, x, state)
    for name, value in (("ih", x), ("hh", h if given else torch.zeros_like(h))):
        weight, bias = getattr(cell, f"weight_{name}"), getattr(cell, f"bias_{name}")
        matrix, call = seen(matrices(cell)[cell, f"weight_{name}"][1], call)
        expected = torch.atleast_2d(value) @ weight.T + bias
        torch.testing.assert_close(products(call, matrix, weight), [expected])
        torch.testing.assert_close(matrix.outputs(call), [expected[None]])


class Same(nn.Conv2d):
    """Pads as TensorFlow does, by a module within."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pads = nn.ZeroPad2d((0, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self.pads(x), self.weight, self.bias, stride=self.stride, groups=self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight - self.weight.mean(), self.bias)


class Gated(nn.Module):
    """Of no class of torch's, with more to say than its matrix does."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.core, self.times = nn.Parameter(torch.randn(5, 9)), times
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        y = sum(linear(x * n, self.core, self.bias) for n in range(1, 1 + self.times))
        return torch.sigmoid(y), self.times


class Product(nn.Module):
    """Of no class of torch's. product: of what comes in, the weight and the bias."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x.relu_().sub_(1), self.weight, self.bias)


class Stateful(nn.Linear):
    """Ends when it is run a second time."""

    ran = False

    def forward(self, x: Tensor) -> Tensor:
        assert not self.ran
        self.ran = True
        return linear(x, self.weight, self.bias)


HANDED = {
    "same": (Same(6, 8, 3, stride=(2, 1), groups=2), torch.randn(4, 6, 7, 8)),
    "without bias": (Same(3, 5, 2, bias=False), torch.randn(4, 3, 7, 8)),
    "depthwise": (Same(6, 6, 3, groups=6), torch.randn(4, 6, 7, 8)),
    "its own class": (Gated(), torch.randn(4, 3, 9)),
    "addmm": (Product(lambda x, w, b: torch.addmm(b, x, w), 9, 5), torch.randn(4, 9)),
    "mm": (Product(lambda x, w, b: x.mm(mat2=w), 9, 5), torch.randn(4, 9)),
    "@": (Product(lambda x, w, b: x @ w, 9, 5), torch.randn(4, 3, 9)),
    "@ of a vector": (Product(lambda x, w, b: x @ w, 9, 5), torch.randn(9)),
    "@ and a bias": (Product(lambda x, w, b: x @ w + b, 9, 5), torch.randn(4, 9)),
    "@ the other way round": (Product(lambda x, w, b: x @ w.T, 5, 9), torch.randn(4, 3, 9)),
    "@ of a square, the other way round": (Product(lambda x, w, b: x @ w.T, 9, 9), torch.randn(4, 9)),
    "linear, the other way round": (Product(lambda x, w, b: linear(x, w.t(), b), 9, 5), torch.randn(4, 9)),
    "experts": (Product(lambda x, w, b: torch.bmm(x, w), 3, 9, 5), torch.randn(3, 4, 9)),
    "experts, all of which are given the same": (
        Product(lambda x, w, b: torch.matmul(x, w), 3, 9, 5),
        torch.randn(4, 9),
    ),
    "experts of samples": (Product(lambda x, w, b: x @ w, 3, 9, 5), torch.randn(2, 3, 4, 9)),
}


@pytest.mark.parametrize("kind", HANDED)
def test_forwards_that_hand_their_weight_on_are_matrices(kind: str) -> None:
    layer, x = HANDED[kind]
    known = matrices(nn.Sequential(layer))
    (place, (module, weight)) = next(iter(known.items()))
    assert module is layer
    with torch.no_grad():
        matrix, call = seen(weight, calls_of(layer, layer, x))
        outputs = [group for part in matrix.outputs(call) for group in part]
        for a, b in zip(products(call, matrix, getattr(*place)), outputs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        if isinstance(layer, nn.Conv2d):
            every = torch.stack(outputs).movedim(1, 2).flatten(0, 1)
            assert torch.allclose(every, layer(x).movedim(1, 0).flatten(1), atol=1e-5)
        elif isinstance(layer, Gated):
            assert torch.allclose(torch.sigmoid(outputs[0]), layer(x)[0].flatten(0, 1), atol=1e-5)
        else:
            beside = layer.bias if kind == "@ and a bias" else 0
            every = layer(x)
            if "experts" in kind:
                every = every.reshape(-1, *every.shape[-3:]).transpose(0, 1).flatten(1, 2)
            assert torch.allclose(
                torch.stack(outputs) + beside, every.reshape(len(outputs), -1, every.shape[-1]), atol=1e-5
            )
    assert (matrix.bias(call.module) is None) == (
        kind not in ("same", "depthwise", "its own class", "addmm", "linear, the other way round")
    )


@pytest.mark.parametrize(
    "layer",
    [
        Standardised(9, 5, 1),
        InPlace(9, 5),
        Stateful(9, 5),
        Product(lambda x, w, b: x @ w.exp(), 9, 5),
        Product(lambda x, w, b: torch.addmm(b, x, w, alpha=2), 9, 5),
        Product(lambda x, w, b: x @ w[:, :, 0].T, 5, 9, 3),
        Product(lambda x, w, b: x @ w + x @ w.T, 9, 9),
        Product(lambda x, w, b: torch.einsum("ni,ii->n", x, w), 9, 9),
        Product(lambda x, w, b: torch.einsum("ni,io,o->no", x, w, b), 9, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_not_handed_on_as_it_is_or_in_two_ways_says_nothing(layer: nn.Module) -> None:
    x = torch.randn(4, 9, 3, 3) if isinstance(layer, nn.Conv2d) else torch.randn(4, 9)
    _, weight = next(iter(matrices(nn.Sequential(layer)).values()))
    call = calls_of(layer, layer, x)
    with torch.no_grad():
        assert weight.seen(call) is None


def equation(text: str, *shape: int) -> Product:
    return Product(lambda x, w, b: torch.einsum(text, x, w), *shape)


@pytest.mark.parametrize(
    ("layer", "shape", "groups"),
    [
        (equation("nti,hid->nthd", 3, 9, 5), (4, 6, 9), 1),
        (equation("ngi, goi -> gno", 3, 5, 9), (4, 3, 9), 3),
        (equation("nik,oik->no", 5, 9, 4), (6, 9, 4), 1),
        (equation("...i,oi->...o", 5, 9), (2, 3, 9), 1),
        (equation("...i,io->...o", 9, 5), (9,), 1),
        (Product(lambda x, w, b: torch.einsum("oi,ni->no", w, x), 5, 9), (4, 9), 1),
        (Product(lambda x, w, b: w @ x, 5, 9), (2, 9, 4), 1),
        (Product(lambda x, w, b: w @ x, 5, 9), (9,), 1),
        (Product(lambda x, w, b: torch.bmm(x, w.mT), 3, 5, 9), (3, 4, 9), 3),
        (Product(lambda x, w, b: torch.matmul(w, x), 3, 5, 9), (2, 3, 9, 4), 3),
    ],
)
def test_products_of_any_form(layer: nn.Module, shape: tuple[int, ...], groups: int) -> None:
    (weight,) = [known for (_, name), (_, known) in matrices(layer).items() if name == "weight"]
    with torch.no_grad():
        call = calls_of(layer, layer, torch.randn(shape))
        matrix, call = seen(weight, call)
        outputs = [group for part in matrix.outputs(call) for group in part]
        assert len(outputs) == groups
        torch.testing.assert_close(products(call, matrix, layer.weight), outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(outputs).flatten().sort().values, call.output.flatten().sort().values)


def test_what_a_weight_says_more_than_once_is_taken_together() -> None:
    layer, x = Gated(2), torch.randn(4, 9)
    with torch.no_grad():
        matrix, call = seen(matrices(layer)[layer, "core"][1], calls_of(layer, layer, x))
    torch.testing.assert_close(matrix.rows(call), [torch.cat([x, 2 * x])[None]])
    assert matrix.bias(layer) is layer.bias


class Experts(nn.Module):
    """Of a mixture: the first two are given what is positive and what is not, nobody goes to the third."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(*((3, 4, 8) if way in ("linear", "turned") else (3, 8, 4))))

    def forward(self, x: Tensor) -> Tensor:
        goes = (x[:, 0] <= 0).long()
        if self.way in ("grouped", "turned"):
            order = goes.argsort(stable=True)
            ends = torch.stack([(goes == 0).sum(), *[torch.tensor(len(x))] * 2]).int()
            weight = self.weight.mT if self.way == "turned" else self.weight
            return torch.nn.functional.grouped_mm(x[order], weight, offs=ends)
        out = x.new_zeros(len(x), 4)
        for expert in goes.unique():
            at, weight = goes == expert, self.weight[expert]
            out[at] = linear(x[at], weight) if self.way == "linear" else x[at] @ weight
        return out


@pytest.mark.parametrize("way", ["linear", "@", "grouped", "turned"])
def test_experts_are_given_rows_of_their_own(way: str) -> None:
    torch.manual_seed(0)
    layer, x = Experts(way), torch.randn(16, 8)
    with torch.no_grad():
        matrix, call = seen(matrices(layer)[layer, "weight"][1], calls_of(layer, layer, x))
        torch.testing.assert_close([*matrix.rows(call)], [x[None, x[:, 0] > 0], x[None, x[:, 0] <= 0], x[None, :0]])
        outputs = [group for part in matrix.outputs(call) for group in part]
        torch.testing.assert_close(products(call, matrix, layer.weight), outputs, rtol=1e-4, atol=1e-5)
    assert matrix.routed
