"""Models whose weights are computed from others: the same function, plain weights, files that can be loaded again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import autocompress as ac
from autocompress.agent.payload import payload
from autocompress.errors import TaskError
from autocompress.model.reparametrization import copied, plain
from autocompress.model.surgery import tensors
from autocompress.space import BoundSpace
from autocompress.task import check_task, measure

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(prune.l1_unstructured(layer, "weight", 0.3), "bias", 2)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


def symmetric(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "symmetric": symmetric,
    "weight_norm hook": weight_norm,
    "spectral_norm hook": spectral_norm,
    "prune": pruned,
}


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


@pytest.fixture(params=WAYS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """In which every way of computing weights was used and left its traces."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), WAYS[request.param](nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))
    for _ in range(30):  # spectral_norm comes to rest
        torch.autograd.backward(made(X).sum())
    return made.eval()


def task_of(model: nn.Module) -> ac.Task:
    batches = [(X[i : i + 8], X[i : i + 8, :3].argmax(1)) for i in (0, 8, 16)]
    return ac.Task(model, train=batches, val=batches, test=batches, epochs=1)


def test_the_function_stays_and_the_weights_are_plain(model: nn.Module) -> None:
    before = model(X)
    made = plain(copied(model))
    assert torch.allclose(made(X), before, atol=1e-6)
    assert {*tensors(made)} == {f"{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")}
    assert all(isinstance(value, nn.Parameter) for value in (made[2].weight, made[2].bias))


def test_a_copy_leaves_the_model_as_it_is(model: nn.Module) -> None:
    names = list(model.state_dict())
    task_of(model).build()
    assert list(model.state_dict()) == names
    torch.autograd.backward(model(X).sum())


def test_it_is_compressed_and_its_file_fits_the_model_as_it_was_given(model: nn.Module, tmp_path: Path) -> None:
    task = task_of(model)
    workshop = ac.Workshop.on(task, ac.SearchSpace.named("default"), tmp_path)
    heaviest = workshop.space.recipe({d.key: d.choices[-1] for d in workshop.space if d.name != "precision"})
    result = workshop.finish(0, heaviest)
    loaded = ac.load(tmp_path / "trials" / "0" / "model.acz", model)
    assert (loaded(X).argmax(1) == X[:, :3].argmax(1)).double().mean() == pytest.approx(result.val_accuracy)
    assert payload(task, False, workshop.original, workshop.space, tmp_path, 0)


class Conv1D(nn.Module):
    """As transformers has it, for GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_transposed_linear_layer_loses_channels(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Conv1D(24, 6), nn.GELU(), Conv1D(6, 24)), nn.Linear(6, 3))
    task = task_of(model)
    assert torch.allclose(task.build()(X), model(X), atol=1e-5)
    workshop = ac.Workshop.on(task, ac.SearchSpace.named("default"), tmp_path)
    workshop.finish(0, workshop.space.recipe({"1.0:channels": 0.55}))
    loaded = ac.load(tmp_path / "trials" / "0" / "model.acz", model)
    assert [tuple(tensors(loaded)[f"1.{i}.weight"].shape) for i in (0, 2)] == [(13, 6), (6, 13)]
    assert isinstance(model[1][0], Conv1D)


class Record:
    """As a policy keeps the distribution of its last actions."""

    value: Tensor


class Remembering(nn.Module):
    """Keeps what it computed last, for whoever wants to look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen: list[Tensor] = []
        self.record = Record()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.last, self.seen, self.record.value = y, [y], y
        return y


def test_what_a_forward_pass_left_on_a_model_is_copied_with_it() -> None:
    model = Remembering()
    model(X)
    made = task_of(model).build()
    assert isinstance(made, Remembering)
    assert torch.equal(made.last, model.last)
    assert made.last.is_leaf
    assert made.last is made.seen[0] is made.record.value


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
        self.lock = threading.Lock()


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_cannot_be_compressed_is_refused() -> None:
    mixed = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    for unfit, message in (
        (Locked, r"cannot be copied \(TypeError: .*lock.*\): what copy.deepcopy cannot do"),
        (torch.ao.quantization.quantize_dynamic(mixed, {"1"}), "'1.*of the model's state_dict is no parameter and no"),
        (nn.Sequential(nn.LazyLinear(3)), r"'0.weight' has no shape yet: run the model on a batch"),
        (torch.jit.script(nn.Linear(6, 3)), r"is a ScriptModule, .*: give the nn.Module"),
        (nn.Softmax(1), r"has no parameters of floats, so nothing to compress"),
    ):
        task = task_of(unfit)
        with pytest.raises(TaskError, match=message):
            check_task(task, task.build())


class Here:
    """What can be copied, but not sent."""

    def __deepcopy__(self, memo: object) -> Here:
        return self

    def __reduce__(self) -> str:
        raise TypeError("it is of this process")


def test_a_model_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    model.log = Here()  # type: ignore[assignment]
    with pytest.raises(TaskError, match=r"the model of task 'custom' cannot be sent to workers \(TypeError: "):
        payload(task_of(nn.Linear(6, 3)), True, model, BoundSpace(()), tmp_path, 0)


def test_compiled_models_are_searched_as_what_was_compiled(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)
        return nn.Sequential(*layers)

    whole, part = torch.compile(build(), backend="eager"), build()
    part[0] = torch.compile(part[0], backend="eager")
    part[1].compile(backend="eager")
    assert isinstance(whole, nn.Module)
    x = torch.randn(5, 6)
    for model in (whole, part):
        made = plain(copied(model))
        assert made.state_dict().keys() == build().state_dict().keys()
        torch.testing.assert_close(made(x), build()(x))
        assert not any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in made.modules())
    assert hasattr(part[0], "_orig_mod")
    assert part[1]._compiled_call_impl


class Reader(nn.Module):
    """torch's own encoder, by its defaults, of texts that are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        padded = ids == 0
        said = self.encoder(self.embed(ids), src_key_padding_mask=padded)
        out: Tensor = self.head(said.masked_fill(padded[:, :, None], 0).sum(1))
        return out


@pytest.mark.parametrize("epochs", [0, 1])
def test_an_encoder_is_searched_with_padded_texts(epochs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Reader().eval(), []
    for _ in range(3):
        ids = torch.randint(1, 20, (16, 7))
        ids[:8, 4:] = 0
        batches.append((ids, model(ids).argmax(1)))
    task = ac.Task(model, train=batches, val=batches, test=batches, epochs=epochs)
    workshop = ac.Workshop.on(task, ac.SearchSpace.named("default"), tmp_path)
    assert measure(task, workshop.original, "val") == 1
    chosen = workshop.space.recipe({d.key: d.choices[1] for d in workshop.space if d.name != "precision"})
    result = workshop.finish(0, chosen)
    decoded = ac.load(tmp_path / "trials" / "0" / "model.acz", model)
    assert measure(task, decoded, "val") == result.val_accuracy


def test_an_encoder_computes_with_the_activations_that_it_has_by_now() -> None:
    """By itself it only remembers, in evaluation, that its activation was a ReLU."""
    torch.manual_seed(0)
    made, ids = plain(copied(Reader())), torch.randint(1, 20, (4, 7))
    for layer in made.encoder.layers:
        layer.activation = nn.Tanh()
    with_gradient = made(ids)
    with torch.no_grad():
        torch.testing.assert_close(made(ids), with_gradient)
