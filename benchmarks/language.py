"""A character model on tiny Shakespeare, read from the folder `AUTOCOMPRESS_DATA`.

`--task benchmarks.language:shakespeare`: a transformer of 1.8 million parameters that predicts each next character of
128; the first nine tenths of the text train, the next twentieth validates. Accuracy is the share of characters that
are predicted.
"""

from __future__ import annotations

import gzip
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress import Task
from benchmarks.tasks import data_folder, with_kept_original

WIDTH, LAYERS, HEADS, LENGTH = 192, 4, 6, 128
STEPS, PEAK, BATCH = 600, 2e-3, 32


@cache
def characters() -> Tensor:
    """int64 [1,115,394]: places in the alphabet of the text."""
    text = gzip.decompress((data_folder() / "tinyshakespeare" / "input.txt.gz").read_bytes()).decode()
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text])


class Attention(nn.Module):
    """Causal; [N, T, WIDTH] -> [N, T, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        said = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(said.transpose(1, 2).reshape(n, t, WIDTH))
        return out


class Block(nn.Module):
    """Norms come first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.up, self.act, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return out


class CharacterModel(nn.Module):
    """int64 [N, T] -> float32 [N, T, 65]."""

    def __init__(self, alphabet: int = 65) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(alphabet, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        out: Tensor = self.head(self.norm(self.blocks(self.token(x) + self.place(places))))
        return out


def windows(text: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of `count` passages, from anywhere in the text, and what follows each of their characters."""
    starts = torch.randint(len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    passages = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return [*zip(torch.split(passages[:, :-1], BATCH), torch.split(passages[:, 1:], BATCH), strict=True)]


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def predicted(logits: Tensor, target: Tensor) -> float:
    return (logits.argmax(-1) == target).double().mean().item()


def _pretrain(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=STEPS)
    model.train()
    for inputs, target in windows(_split()[0], STEPS * BATCH, 0):
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(inputs), target))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _split() -> tuple[Tensor, Tensor, Tensor]:
    text = characters()
    first, second = len(text) * 18 // 20, len(text) * 19 // 20
    return text[:first], text[first:second], text[second:]


def shakespeare() -> Task:
    """512 passages train, 128 validate, 128 test."""
    train, val, test = _split()
    task = Task(
        CharacterModel,
        train=windows(train, 512, 1),
        val=windows(val, 128, 2),
        test=windows(test, 128, 3),
        loss=loss,
        metric=predicted,
        pretrain=_pretrain,
        epochs=3,
        name="shakespeare",
    )
    return with_kept_original(task)
