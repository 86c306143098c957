"""The default task: 1,797 real handwritten digits (8 x 8) and a small residual network.

The images come with scikit-learn (Alpaydin and Kaynak, 1998), so nothing is downloaded. The split is
fixed: a permutation with seed 0, then the first 1,077 images train, the next 360 validate, the last
360 test. One image of 360 is 0.28 points of accuracy, too coarse to select by; so the validation split
shows each of its images as it is and in seven fixed poses. The test split is the images as they are.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from autocompress.task import Task

SPLIT = {"train": slice(0, 1077), "val": slice(1077, 1437), "test": slice(1437, 1797)}
BATCH = 64
POSES = 8


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                    norm=nn.BatchNorm2d(outputs),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


def residual_net() -> nn.Module:
    """[N, 1, 8, 8] -> [N, 10]; 173,842 parameters."""
    stem = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 24, 3, 1, 1, bias=False), norm=nn.BatchNorm2d(24), relu=nn.ReLU())
    )
    return nn.Sequential(
        OrderedDict(
            stem=stem,
            block1=Residual(24, 24, 1),
            block2=Residual(24, 48, 2),
            block3=Residual(48, 96, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(96, 10),
        )
    )


def load_images() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 1, 8, 8] in [-1, 1] and labels int64 [1797], in the fixed order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.int64)[order]


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image turned by up to 10 degrees, scaled by up to 10% and shifted by up to a pixel each way;
    float32 [N, 1, 8, 8] -> the same.
    """
    n = len(images)
    angle, scale, *shift = torch.rand(4, n, generator=generator) * 2 - 1
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    rows = [angle.cos() * scale, -angle.sin() * scale, shift[0] / 4, angle.sin() * scale, angle.cos() * scale]
    transform = torch.stack([*rows, shift[1] / 4], 1).view(n, 2, 3)
    grid = nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def digits() -> Task:
    """The task as `--task digits` finds it."""
    images, labels = load_images()

    def train_batches() -> list[tuple[Tensor, Tensor]]:
        part = SPLIT["train"]
        order = torch.randperm(part.stop - part.start)
        return [(augment(images[part][i]), labels[part][i]) for i in torch.split(order, BATCH)]

    def validation() -> list[tuple[Tensor, Tensor]]:
        part = SPLIT["val"]
        generator = torch.Generator().manual_seed(0)
        posed = [augment(images[part], generator) for _ in range(POSES - 1)]
        return [(pose, labels[part]) for pose in (images[part], *posed)]

    def pretrain(model: nn.Module) -> None:
        epochs = 40
        steps = epochs * -(-SPLIT["train"].stop // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        model.train()
        for _ in range(epochs):
            for inputs, target in train_batches():
                loss = nn.functional.cross_entropy(model(inputs), target, label_smoothing=0.1)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        model.eval()

    return Task(
        model=residual_net,
        train=train_batches,
        val=validation(),
        test=[(images[SPLIT["test"]], labels[SPLIT["test"]])],
        pretrain=pretrain,
        epochs=12,
        learning_rate=3e-3,
        name="digits",
    )
