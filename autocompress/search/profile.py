"""What is known before the first trial: the effect and the bytes of every choice, measured alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocompress.anatomy import Anatomy, Memberships
from autocompress.recipe import MODEL, Choice
from autocompress.space import BoundDimension, BoundSpace
from autocompress.techniques.base import structures

Chosen = Mapping[str, Choice]
"""key ("site:dimension") -> choice, complete: one for every dimension of the space."""


@dataclass(frozen=True)
class LayerCost:
    """groups: keys of channel groups that scale it. keys: dimensions that its bytes were measured for.
    left: key of a structure -> str(choice) -> share of its weights that this leaves."""

    name: str
    groups: Memberships
    keys: tuple[str, ...]
    table: Mapping[str, float]
    left: Mapping[str, Mapping[str, float]]


class Profile:
    """Predicts the bytes of any recipe and holds the effects of single choices.

    effects: key -> str(choice) -> rise of the output distance. Bytes of a layer come from coding its
    weights with every combination of its own choices, scaled by the channels that stay.
    """

    def __init__(self, space: BoundSpace, anatomy: Anatomy, measured: Mapping[str, Any]) -> None:
        self.space = space
        self.effects: dict[str, dict[str, float]] = {k: dict(v) for k, v in measured["effects"].items()}
        self.header_bytes = float(measured["header_bytes"])
        self._vector_bytes: Mapping[str, float] = measured["vector_bytes"]
        self._vectors = anatomy.vectors
        self._vector_total = max(1, sum(count for count, _ in anatomy.vectors))
        grouped = {d.site for d in space if d.name == "channels"}
        self.layers: dict[str, LayerCost] = {}
        for layer in anatomy.layers:
            # the order of the keys is the order in which the table was measured
            keys = tuple(d.key for d in space if d.site == layer.name and d.name not in structures())
            groups = tuple((f"{group}:channels", part) for group, part in layer.groups if group in grouped)
            left = {
                key: {choice: shares.get(layer.name, 1.0) for choice, shares in choices.items()}
                for key, choices in measured["weights_left"].items()
                if any(layer.name in shares for shares in choices.values())
            }
            self.layers[layer.name] = LayerCost(layer.name, groups, keys, measured["layer_bytes"][layer.name], left)
        self.touches: dict[str, list[str]] = {d.key: [] for d in space}
        for cost in self.layers.values():
            for key in {*cost.keys, *dict(cost.groups), *cost.left}:
                self.touches[key].append(cost.name)

    def layer_bytes(self, name: str, chosen: Chosen) -> float:
        cost = self.layers[name]
        size = cost.table["|".join(str(chosen[key]) for key in cost.keys)]
        for key, part in cost.groups:
            size *= 1 - part * (1 - float(chosen[key]))
        for key, shares in cost.left.items():
            size *= shares[str(chosen[key])]
        return size

    def vector_bytes(self, chosen: Chosen) -> float:
        key = f"{MODEL}:vectors"
        size = self._vector_bytes[str(chosen[key])] if key in chosen else next(iter(self._vector_bytes.values()))
        kept = 0.0
        for count, groups in self._vectors:
            share = 1.0
            for group, part in groups:
                share *= 1 - part * (1 - float(chosen.get(f"{group}:channels", 1.0)))
            kept += count * share
        return size * kept / self._vector_total

    def predict(self, chosen: Chosen) -> float:
        """Bytes of the file of this recipe, before any training."""
        layers = sum(self.layer_bytes(name, chosen) for name in self.layers)
        return self.header_bytes + self.vector_bytes(chosen) + layers

    def affected_bytes(self, key: str, chosen: Chosen) -> float:
        """The part of `predict` that the choice of `key` can change."""
        size = sum(self.layer_bytes(name, chosen) for name in self.touches[key])
        if key.endswith(":channels") or key == f"{MODEL}:vectors":
            size += self.vector_bytes(chosen)
        return size

    def default(self) -> dict[str, Choice]:
        """The lightest recipe of the space."""
        return {d.key: d.default if d.default in d.choices else d.choices[0] for d in self.space}

    def smallest_bytes(self) -> float:
        """About the smallest file that the space can reach: every dimension at its cheapest choice."""
        chosen = self.default()
        for _ in range(2):
            for dimension in self.space:
                chosen[dimension.key] = self._cheapest(dimension, chosen)
        return self.predict(chosen)

    def _cheapest(self, dimension: BoundDimension, chosen: Chosen) -> Choice:
        key = dimension.key
        return min(dimension.choices, key=lambda choice: self.affected_bytes(key, {**chosen, key: choice}))
