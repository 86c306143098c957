"""Models of every kind that the house claims to handle, none of which it knows by name."""

from __future__ import annotations

import functools
import os
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "100"
# other processes find the tasks of tests/mini.py
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn

import autocompress  # noqa: F401  (registers the techniques)
from autocompress.agent import engine
from autocompress.agent.supply import Supply
from autocompress.model.anatomy import Anatomy, read_anatomy
from autocompress.space import BoundSpace
from autocompress.task import Task
from autocompress.tasks.digits import SPLIT, load_images
from autocompress.trial.workshop import TrialResult, Workshop

N = 48
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
torch.set_num_threads(1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 24), nn.Linear(4, 24)
        self.relu = nn.ReLU()
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.relu(self.left(x)), self.relu(self.right(y))], 1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.act(self.up(self.embed(x)))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.core = kind(8, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 16)
        self.place = nn.Parameter(torch.randn(1, 6, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.into(x) + self.place).mean(1))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _block(1, 8), _block(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join, self.out = _block(16, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        return self.out(self.join(torch.cat([first, self.up(second)], 1)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(1, 8)
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu2(x + self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class Spectral(nn.Module):
    """As in Fourier neural operators: weights of frequencies are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 1)
        self.weight = nn.Parameter(torch.randn(6, 6, 5, dtype=torch.cfloat) / 6)
        self.mix = nn.Linear(9, 9, dtype=torch.cfloat)
        self.gelu, self.head = nn.GELU(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        frequencies = self.mix(torch.fft.rfft(x))
        low = torch.einsum("bim,iom->bom", frequencies[..., :5], self.weight)
        return self.head(self.gelu(torch.fft.irfft(low, n=16) + self.skip(x)).mean(2))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, padding=2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8, 3),
    )


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (mlp, lambda: torch.randn(N, 1, 8, 8)),
    "residual": (Residual, lambda: torch.randn(N, 1, 8, 8)),
    "depthwise": (depthwise, lambda: torch.randn(N, 1, 8, 8)),
    "conv1d": (conv1d, lambda: torch.randn(N, 4, 16)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(N, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(N, 5, 8)),
    "transformer": (Attention, lambda: torch.randn(N, 6, 8)),
    "unet": (UNet, lambda: torch.randn(N, 1, 8, 8)),
    "tied": (Tied, lambda: torch.randint(0, 20, (N, 5))),
    "spectral": (Spectral, lambda: torch.randn(N, 2, 16)),
    "two_inputs": (TwoInputs, lambda: (torch.randn(N, 8), torch.randn(N, 4))),
}


def zoo_task(name: str, epochs: int = 1) -> Task:
    """A task whose targets are what the model itself says: any damage shows."""
    torch.manual_seed(0)
    build, inputs = ZOO[name]
    model = build()
    model(*batch) if isinstance(batch := inputs(), tuple) else model(batch)
    model.eval()
    batches = []
    for _ in range(3):
        data = inputs()
        with torch.no_grad():
            output = model(*data) if isinstance(data, tuple) else model(data)
        batches.append((data, output.argmax(1)))
    return Task(model, batches[:1] * 2, batches[1:2], batches[2:], epochs=epochs, name=name)


@functools.cache
def _workshop_of_the_zoo(name: str, device: str) -> Workshop:
    task = zoo_task(name)
    return Workshop(task, task.build(), BoundSpace(()), Path(), 0, device)


def workshop_of(task: Task, device: str = "cpu") -> Workshop:
    """Where candidates of the task are made, without a run folder. Models of the zoo are analysed once: no candidate
    changes its original."""
    if task.name in ZOO:
        return _workshop_of_the_zoo(task.name, device)
    return Workshop(task, task.build(), BoundSpace(()), Path(), 0, device)


def agree(output: Tensor, target: Tensor) -> float:
    return (output.argmax(1) == target).float().mean().item()


@pytest.fixture(params=sorted(ZOO))
def any_task(request: pytest.FixtureRequest) -> Task:
    return zoo_task(request.param)


@functools.cache
def trained_digits() -> nn.Module:
    """A perceptron that was trained, for a second, on the real digits."""
    torch.manual_seed(0)
    images, labels = load_images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(images[:1077]), labels[:1077])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval()


def small_digits(epochs: int = 4) -> Task:
    """Real data and a real, trained model, small enough for a test."""
    images, labels = load_images()

    def batches(split: str, size: int) -> list[tuple[Tensor, Tensor]]:
        part = SPLIT[split]
        return list(zip(images[part].split(size), labels[part].split(size), strict=True))

    data = batches("train", 128), batches("val", 400), batches("test", 400)
    return Task(trained_digits(), *data, epochs=epochs, name="small-digits")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles of tests are kept among the tests' own files."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run_trials(payload: bytes, supply: Supply, *_: Any) -> None:
    workshop: Workshop = cloudpickle.loads(payload)()
    while (spec := supply.next()) is not None:
        try:
            for event in workshop.run(spec):
                if isinstance(event, TrialResult):
                    supply.finished(spec.number, event)
                elif supply.rung(spec.number, event):
                    supply.stopped(spec.number)
                    break
        except Exception:
            supply.failed(spec.number, traceback.format_exc())


@contextmanager
def trials_run_here() -> Iterator[None]:
    """The trials of a search run in this process: for tests of something other than Ray, whose start takes longer than
    all of a small search."""
    with (
        mock.patch.object(engine, "start_ray", return_value=engine.Connection(shared=True)),
        mock.patch.object(engine, "run_trials", _run_trials),
    ):
        yield


@pytest.fixture
def without_ray() -> Iterator[None]:
    with trials_run_here():
        yield


def anatomy_of(task: Task) -> Anatomy:
    batch = next(task.batches("train"))
    return read_anatomy(task.build(), lambda model: task.run(model, batch)[0])
