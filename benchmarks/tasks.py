"""Tasks of the benchmarks, on real data: MNIST and CIFAR-10, read from the folder `AUTOCOMPRESS_DATA`.

Used by name (`--task benchmarks.tasks:lenet5`) from the root of the repository. Each trains its own
original for a few epochs on a stated subset of the training images; the last training images validate.
"""

from __future__ import annotations

import io
import lzma
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from autocompress import Task
from autocompress.task import fastest_device
from autocompress.tasks.digits import SPLIT, augment, digits, load_images

Batches = Callable[[], list[tuple[Tensor, Tensor]]]
ORIGINALS = Path(__file__).parent / "originals"
VALIDATION = 5000
_ADAMW = partial(torch.optim.AdamW, weight_decay=0.02)
_SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)


def data_folder() -> Path:
    """The folder with `mnist/` and `cifar10/`; their READMEs tell the formats."""
    return Path(os.environ.get("AUTOCOMPRESS_DATA", "../shared/data"))


@cache
def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images float32 [60000, 1, 28, 28], labels int64, test images, labels), standardised."""
    with np.load(data_folder() / "mnist" / "mnist.npz") as file:
        parts = [torch.from_numpy(file[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
    images = [(part[:, None].float() / 255 - 0.1307) / 0.3081 for part in parts[::2]]
    return images[0], parts[1].long(), images[1], parts[3].long()


@cache
def cifar10() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images float32 [50000, 3, 32, 32], labels int64, test images, labels), standardised."""
    out = []
    for split in ("train", "test"):
        folder = data_folder() / "cifar10"
        filtered = np.load(io.BytesIO(lzma.decompress((folder / f"{split}_images.npy.xz").read_bytes())))
        green, red, blue = filtered.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
        pixels = torch.from_numpy(np.stack([red + green, green, blue + green], 1)).float() / 255
        mean, deviation = pixels.new_tensor([0.4914, 0.4822, 0.4465]), pixels.new_tensor([0.2470, 0.2435, 0.2616])
        out.append((pixels - mean[:, None, None]) / deviation[:, None, None])
        out.append(torch.from_numpy(np.load(folder / f"{split}_labels.npy")).long())
    return out[0], out[1], out[2], out[3]


def lenet_300_100_net() -> nn.Module:
    """[N, 1, 28, 28] -> [N, 10]; 266,610 parameters (LeCun et al., 1998)."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def lenet5_net() -> nn.Module:
    """[N, 1, 28, 28] -> [N, 10]; Caffe's LeNet-5, 431,080 parameters."""
    features = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut by subsampling and zero padding (He et al., 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        out: Tensor = self.relu2(y + x)
        return out


def resnet20_net() -> nn.Module:
    """[N, 3, 32, 32] -> [N, 10]; 269,722 parameters."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [
        _Block(width // 2 if first and width > 16 else width, width, 2 if first and width > 16 else 1)
        for width in (16, 32, 64)
        for first in (True, False, False)
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg16_net() -> nn.Module:
    """[N, 3, 32, 32] -> [N, 10]; VGG-16 with batch norm and one hidden layer of 512, 14,987,210 parameters."""
    layers: list[nn.Module] = []
    inputs = 3
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    hidden = [nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *hidden, nn.Linear(512, 10))


def _shuffled(images: Tensor, labels: Tensor, batch: int, augment: Callable[[Tensor], Tensor]) -> Batches:
    def batches() -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images)).to(images.device)
        return [(augment(images[i]), labels[i]) for i in torch.split(order, batch)]

    return batches


def _shift_and_flip(images: Tensor) -> Tensor:
    """Each batch shifted by up to 4 pixels; every image mirrored by chance."""
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    row, column = torch.randint(0, 9, (2,)).tolist()
    moved = padded[:, :, row : row + images.shape[2], column : column + images.shape[3]]
    return torch.where(torch.rand(len(images), 1, 1, 1).to(images.device) < 0.5, moved.flip(3), moved)


def _pretrain(
    train: Batches, epochs: int, peak: float, kind: Callable[..., torch.optim.Optimizer] = _ADAMW
) -> Callable[[nn.Module], None]:
    """One cycle to the peak rate and back, on the GPU where there is one."""

    def pretrain(model: nn.Module) -> None:
        device = fastest_device()
        steps, optimizer = epochs * len(train()), kind(model.to(device).parameters(), lr=peak)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
        model.train()
        for _ in range(epochs):
            for inputs, target in train():
                loss = nn.functional.cross_entropy(model(inputs.to(device)), target.to(device))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        model.cpu().eval()

    return pretrain


def with_kept_original(task: Task) -> Task:
    """The same task, whose original is in benchmarks/originals/, or else is trained once and kept in runs/: by one
    thread, since sums of several are others; so are those of another processor, which trains another original."""
    pretrain, file = task.pretrain, f"{task.name}.safetensors"
    path = ORIGINALS / file
    if not path.is_file():
        path = Path("runs") / "bench-originals" / file
    assert pretrain is not None

    def load_or_train(model: nn.Module) -> None:
        if not path.is_file():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            pretrain(model)
            torch.set_num_threads(threads)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, str(path))
        load_model(model, str(path))

    return replace(task, pretrain=load_or_train)


def _task(
    name: str,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    model: Callable[[], nn.Module],
    augment: Callable[[Tensor], Tensor],
    original: int,
    original_epochs: int,
    subset: int,
    epochs: int,
    held_out: int,
) -> Task:
    """original, subset: training images of the original's epochs and of a trial's."""
    images, labels, test_images, test_labels = data
    val = slice(len(images) - VALIDATION, len(images) - VALIDATION + held_out)
    whole = _shuffled(images[:original], labels[:original], 128, augment)
    test = slice(0, len(test_images) if held_out == VALIDATION else held_out)
    return Task(
        model=model,
        train=_shuffled(images[:subset], labels[:subset], 128, augment),
        val=list(zip(torch.split(images[val], 500), torch.split(labels[val], 500), strict=True)),
        test=list(zip(torch.split(test_images[test], 500), torch.split(test_labels[test], 500), strict=True)),
        pretrain=_pretrain(whole, original_epochs, 2e-3 * math.sqrt(2)),
        epochs=epochs,
        name=name,
    )


def lenet_300_100() -> Task:
    """MNIST; trials train on the first 20,000 images."""
    return _task("lenet_300_100", mnist(), lenet_300_100_net, lambda x: x, 55_000, 10, 20_000, 4, VALIDATION)


def lenet_300_100_short() -> Task:
    """As `lenet_300_100`, for many searches: 6,000 images, 4 epochs a trial, the original of benchmarks/originals/."""
    task = _task("lenet_300_100", mnist(), lenet_300_100_net, lambda x: x, 55_000, 10, 6_000, 4, VALIDATION)
    return with_kept_original(task)


def lenet_300_100_full() -> Task:
    """MNIST; trials train on all 55,000 images, the original is kept in runs/."""
    task = _task("lenet_300_100_full", mnist(), lenet_300_100_net, lambda x: x, 55_000, 20, 55_000, 6, VALIDATION)
    return with_kept_original(task)


class RowReader(nn.Module):
    """A transformer that reads an image of 8 x 8 as a sequence of 8 rows: [N, 1, 8, 8] -> [N, 10]."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.into = nn.Linear(8, width)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.into(x[:, 0]) + self.place).mean(1))
        return y


def digit_rows() -> Task:
    """scikit-learn's digits, read row by row by a transformer of 39,226 parameters; data and splits of `digits`."""
    return replace(digits(), model=RowReader, name="digit_rows", learning_rate=3e-3)


def wide_rows() -> Task:
    """As `digit_rows`, by a transformer of 16.8 million parameters in batches of 1,024: work for a GPU."""
    task, (images, labels) = digit_rows(), load_images()
    train = _shuffled(images[SPLIT["train"]], labels[SPLIT["train"]], 1024, augment)
    return replace(
        task, model=lambda: RowReader(1024), train=train, pretrain=_pretrain(train, 40, 3e-4), name="wide_rows"
    )


def digits_short() -> Task:
    """The built-in `digits`, for many searches: 5 epochs a trial, the original of benchmarks/originals/."""
    return replace(with_kept_original(digits()), epochs=5)


def digit_rows_short() -> Task:
    """As `digit_rows`, for many searches: 5 epochs a trial, the original of benchmarks/originals/."""
    return replace(with_kept_original(digit_rows()), epochs=5)


def lenet5() -> Task:
    """MNIST; trials train on the first 10,000 images."""
    return _task("lenet5", mnist(), lenet5_net, lambda x: x, 55_000, 3, 10_000, 3, VALIDATION)


def lenet5_full() -> Task:
    """MNIST; trials train on all 55,000 images, the original is kept in runs/."""
    task = _task("lenet5_full", mnist(), lenet5_net, lambda x: x, 55_000, 15, 55_000, 5, VALIDATION)
    return with_kept_original(task)


def lenet5_short() -> Task:
    """As `lenet5`, for many searches: 2 epochs of 4,000 images a trial, 2,000 images to validate and to test, and
    an original that is trained once and kept in runs/."""
    task = _task("lenet5", mnist(), lenet5_net, lambda x: x, 55_000, 3, 4_000, 2, 2_000)
    return with_kept_original(task)


def _cifar10_full(name: str, model: Callable[[], nn.Module], original_epochs: int, peak: float, epochs: int) -> Task:
    """CIFAR-10, for a GPU, which holds the images where there is one: 45,000 of them train; the original is kept in
    runs/."""
    images, labels, test_images, test_labels = (part.to(fastest_device()) for part in cifar10())
    own, val = slice(0, len(images) - VALIDATION), slice(len(images) - VALIDATION, None)
    whole = _shuffled(images[own], labels[own], 512, _shift_and_flip)
    task = Task(
        model=model,
        train=_shuffled(images[own], labels[own], 256, _shift_and_flip),
        val=list(zip(torch.split(images[val], 1000), torch.split(labels[val], 1000), strict=True)),
        test=list(zip(torch.split(test_images, 1000), torch.split(test_labels, 1000), strict=True)),
        pretrain=_pretrain(whole, original_epochs, peak, _SGD),
        epochs=epochs,
        name=name,
    )
    return with_kept_original(task)


def resnet20_full() -> Task:
    """CIFAR-10, for a GPU; 70 epochs train the original, 6 a trial."""
    return _cifar10_full("resnet20_full", resnet20_net, 70, 0.6, 6)


def vgg16_full() -> Task:
    """CIFAR-10, for a GPU; 60 epochs train the original, 4 a trial."""
    return _cifar10_full("vgg16_full", vgg16_net, 60, 0.2, 4)


def resnet20() -> Task:
    """As `resnet20_full`, from the same original, for a CPU: trials train for 2 epochs of the first 6,400 images in
    batches of 128; 2,000 images validate, 2,000 test."""
    task, (images, labels, *_) = resnet20_full(), cifar10()
    train = _shuffled(images[:6400], labels[:6400], 128, _shift_and_flip)
    return replace(
        task,
        train=train,
        val=list(task.batches("val"))[:2],
        test=list(task.batches("test"))[:2],
        epochs=2,
        name="resnet20",
    )
