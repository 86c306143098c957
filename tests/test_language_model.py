"""A decoder as the large ones are built: rotary embeddings, gated units, an activation of its own, and outputs in a
dict beside a loss and a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autocompress as ac
from autocompress.agent.sampler import distributions
from autocompress.model.anatomy import is_activation

WIDTH, HEADS, TOKENS = 16, 2, 11


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    place = torch.arange(x.shape[-2], device=x.device)[:, None] / 10
    return x * place.cos() + torch.cat([-second, first], -1) * place.sin()


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)
        self.act = QuickGELU()
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.tokens(ids)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.norm(x + self.o(mixed))
        x = x + self.down(self.act(self.gate(x)) * self.up(x))
        logits = self.head(x)
        return {"loss": logits.square().mean(), "logits": logits, "cache": ((k, v),)}


def next_token_loss(output: dict[str, Any], ids: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def next_token_accuracy(output: dict[str, Any], ids: Tensor) -> float:
    return float((output["logits"][:, :-1].argmax(-1) == ids[:, 1:]).float().mean())


@pytest.fixture
def workshop(tmp_path: Path) -> ac.Workshop:
    torch.manual_seed(0)
    starts = torch.randint(0, TOKENS, (64, 1))
    ids = (starts + torch.arange(12)) % TOKENS
    batches = [(part, part) for part in ids.split(16)]
    task = ac.Task(
        Decoder(), batches, batches, batches, loss=next_token_loss, metric=next_token_accuracy, epochs=2, name="decoder"
    )
    return ac.Workshop.on(task, ac.SearchSpace.named("default"), tmp_path)


def test_gated_units_and_the_width_are_pruned_and_rotary_ones_left_alone(workshop: ac.Workshop) -> None:
    anatomy = workshop.anatomy
    members = {group.name: {*group.members} for group in anatomy.groups}
    assert members["gate"] == {"gate", "up", "down"}
    assert members["o"] == {"tokens", "q", "k", "v", "o", "norm", "gate", "up", "down", "head"}
    assert len(members) == 2
    assert anatomy.activations == {"act": "QuickGELU"}
    assert {"q", "head"} <= {*anatomy.left_alone}
    assert "channels" not in anatomy.left_alone


def test_channels_that_cannot_be_followed_are_left_alone(
    workshop: ac.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.model.tracing._MOST_MEMBERS", 3)
    again = ac.Workshop(workshop.task, workshop.original, ac.SearchSpace.named("default"), workshop.folder, 0)
    assert [group.name for group in again.anatomy.groups] == ["gate"]  # which is found by trying
    assert "they are found in more than" in again.anatomy.left_alone["o"]


def test_its_search_goes_from_large_to_small(workshop: ac.Workshop) -> None:
    """Norms as they were made are constant and take no bytes."""
    profile = ac.Profile(workshop.space, workshop.anatomy, workshop.base_profile())
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=ac.FrontierSampler(profile, budget=3, base_accuracy=0.1)
    )
    sizes = []
    for _ in range(3):
        trial = study.ask(distributions(workshop.space))
        result = workshop.finish(trial.number, workshop.space.recipe(trial.params), trial.user_attrs["parent"])
        trial.set_user_attr("effects", result.effects)
        study.tell(trial, [result.size_bytes, result.val_accuracy])
        sizes.append(result.size_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), True),
        (nn.GELU(), True),
        (nn.Tanh(), True),
        (QuickGELU(), True),
        (nn.Identity(), False),
        (nn.Dropout(0.5).eval(), False),
        (nn.Softmax(-1), False),
        (nn.LayerNorm(64, elementwise_affine=False), False),
        (nn.PReLU(), False),
        (nn.Linear(64, 64), False),
        (nn.Flatten(), False),
        (nn.Sequential(nn.ReLU()), False),
    ],
)
def test_an_activation_is_known_by_what_it_does(module: nn.Module, expected: bool) -> None:
    assert is_activation(module) == expected
