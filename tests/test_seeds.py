"""Random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch

from autocompress.seeds import rewound, seed_everything, seeded


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seeded_block_draws_the_same_and_leaves_no_trace() -> None:
    seed_everything(3)
    expected = [drawn() for _ in range(3)]
    seed_everything(3)
    first = drawn()
    blocks = []
    for _ in range(2):
        with seeded(7):
            blocks.append(drawn())
    assert [first, drawn(), drawn()] == expected
    assert blocks[0] == blocks[1] != expected[0]


def test_what_is_drawn_in_a_rewound_block_is_drawn_once_more() -> None:
    seed_everything(3)
    with rewound():
        first = drawn()
    assert drawn() == first
