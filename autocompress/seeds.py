"""The random numbers of every library that a task may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def rewound() -> Iterator[None]:
    """When the block ends, as if nothing had been drawn: what comes next draws the same."""
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """From this seed until the block ends, and then as if nothing had been drawn."""
    with rewound():
        seed_everything(seed)
        yield
