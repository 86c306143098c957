"""What batches and outputs are made of."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from autocompress.nested import cloned, leaves, map_leaves

Pair = namedtuple("Pair", "one other")


@dataclass(frozen=True)
class Said:
    logits: Tensor
    hidden: list[Tensor]


ONE, OTHER = torch.ones(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ((ONE, [OTHER, None]), [ONE, OTHER, None]),
        (Pair(ONE, {"other": OTHER}), [ONE, OTHER]),
        (OrderedDict(a=ONE, b=OTHER), [ONE, OTHER]),
        (Said(ONE, [OTHER, OTHER]), [ONE, OTHER, OTHER]),
        (SimpleNamespace(loss=OTHER, logits=ONE), [OTHER, ONE]),
        (Normal(ONE, 1 + ONE), [ONE, 1 + ONE]),
        (Independent(Normal(ONE, 1 + ONE), 1), [ONE, 1 + ONE]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_leaves_can_be_changed(value: Any, found: list[Any]) -> None:
    torch.testing.assert_close([*leaves(value)], found)
    doubled = map_leaves(value, lambda leaf: leaf if leaf is None else 2 * leaf)
    assert type(doubled) is type(value)
    torch.testing.assert_close([*leaves(doubled)], [leaf if leaf is None else 2 * leaf for leaf in found])
    torch.testing.assert_close([*leaves(value)], found)
    for copy, leaf in zip(leaves(cloned(value)), leaves(value), strict=True):
        assert copy is not leaf or leaf is None


def test_a_distribution_is_still_one() -> None:
    moved = map_leaves(Independent(Normal(ONE, ONE), 1), lambda leaf: leaf + 1)
    torch.testing.assert_close(moved.log_prob(ONE), Independent(Normal(ONE + 1, ONE + 1), 1).log_prob(ONE))
    assert isinstance(Categorical(logits=ONE), Distribution)
    torch.testing.assert_close([*leaves(Categorical(logits=ONE))], [Categorical(logits=ONE).logits])


def test_what_moves_itself_is_one_leaf() -> None:
    @dataclass
    class Batch:
        x: Tensor

        def to(self, device: str) -> Batch:
            return self

    batch = Batch(ONE)
    assert [*leaves(batch)] == [batch]
