"""What is known before the first trial: the effect and the bytes of every choice, measured alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.anatomy import Anatomy, Memberships
from autocompress.recipe import MODEL, Choice
from autocompress.space import BoundDimension, BoundSpace
from autocompress.techniques.base import structures

Chosen = Mapping[str, Choice]
"""key ("site:dimension") -> choice, complete: one for every dimension of the space."""
Floats = NDArray[np.float64]
_LEAST = 1e-6
"""Share of a row's bytes that is left of what was dropped: never zero, so that it can be divided by."""


@dataclass(frozen=True)
class Own:
    """Where a dimension stands among the combinations of its row. digits: int [combinations], the choice that each has;
    the next choice is `stride` further on."""

    row: int
    stride: int
    digits: NDArray[np.intp]


@dataclass(frozen=True)
class Scaler:
    """A dimension that scales bytes. rows: int [n]. factors: float64 [choices, n], each above zero."""

    rows: NDArray[np.intp]
    factors: Floats


class Profile:
    """Predicts the bytes of any recipe and holds the effects of single choices.

    effects: key -> str(choice) -> rise of the output distance. The bytes of a file are those of its header and
    of rows (one a layer, and one for all vectors that the same channels shape). table: float64
    [rows, combinations], bytes of a row for each combination of its own choices, coded without training; rows
    with fewer combinations are filled up with infinity. own, scalers: what each key does to the rows. Keys in neither
    change no bytes.
    """

    def __init__(self, space: BoundSpace, anatomy: Anatomy, measured: Mapping[str, Any]) -> None:
        self.space = space
        self.effects: dict[str, dict[str, float]] = {k: dict(v) for k, v in measured["effects"].items()}
        self.header_bytes = float(measured["header_bytes"])
        self.dimensions: dict[str, BoundDimension] = {d.key: d for d in space}
        self.places = {d.key: {choice: i for i, choice in enumerate(d.choices)} for d in space}
        rows: list[list[float]] = []
        strides: list[tuple[str, int, int]] = []
        factors: dict[str, dict[int, Floats]] = {}

        def scale(key: str, by: Floats) -> None:
            known = factors.setdefault(key, {})
            known[len(rows) - 1] = known.get(len(rows) - 1, np.ones(len(by))) * by

        def scale_by_channels(groups: Memberships) -> None:
            for group, part in groups:
                key = f"{group}:channels"
                if key in self.dimensions:
                    kept = np.array(self.dimensions[key].choices, np.float64)
                    scale(key, 1 - part * (1 - kept))

        for layer in anatomy.layers:
            # the order of the keys is the order in which the table was measured, the last one fastest
            rows.append(list(measured["layer_bytes"][layer.name].values()))
            stride = 1
            for d in reversed([d for d in space if d.site == layer.name and d.name not in structures()]):
                strides.append((d.key, len(rows) - 1, stride))
                stride *= len(d.choices)
            scale_by_channels(layer.groups)
            for key, left in measured["weights_left"].items():
                shares = [left[str(choice)].get(layer.name, 1.0) for choice in self.dimensions[key].choices]
                if min(shares) < 1:
                    scale(key, np.array(shares))
        vectors = np.array(list(measured["vector_bytes"].values()))
        total = max(1, sum(count for count, _ in anatomy.vectors))
        counts: dict[Memberships, int] = {}
        for count, groups in anatomy.vectors:
            counts[groups] = counts.get(groups, 0) + count
        for groups, count in counts.items():
            rows.append([float(vectors[0]) * count / total])
            scale_by_channels(groups)
            if f"{MODEL}:vectors" in self.dimensions and vectors[0]:  # not if all are constant
                scale(f"{MODEL}:vectors", vectors / vectors[0])
        self.table = np.full((len(rows), max(map(len, rows))), math.inf)
        for at, row in enumerate(rows):
            self.table[at, : len(row)] = row
        each = np.arange(self.table.shape[1])
        self.own = {key: Own(row, stride, each // stride % len(self.places[key])) for key, row, stride in strides}
        self._rows = np.array([own.row for own in self.own.values()], np.intp)
        self.scalers = {
            key: Scaler(np.array(list(known)), np.maximum(np.stack(list(known.values()), 1), _LEAST))
            for key, known in factors.items()
        }

    def combinations(self, chosen: Chosen) -> NDArray[np.intp]:
        """int [rows]: the combination that each row has in a recipe."""
        combinations = np.zeros(len(self.table), np.intp)
        steps = [own.stride * self.places[key][chosen[key]] for key, own in self.own.items()]
        np.add.at(combinations, self._rows, steps)
        return combinations

    def scale(self, chosen: Chosen) -> Floats:
        """float64 [rows]: what other dimensions multiply the bytes of each row by."""
        scale = np.ones(len(self.table))
        for key, scaler in self.scalers.items():
            scale[scaler.rows] *= scaler.factors[self.places[key][chosen[key]]]
        return scale

    def predict(self, chosen: Chosen) -> float:
        """Bytes of the file of this recipe, before any training."""
        rows = self.table[np.arange(len(self.table)), self.combinations(chosen)] * self.scale(chosen)
        return self.header_bytes + float(rows.sum())

    def default(self) -> dict[str, Choice]:
        """The lightest recipe of the space."""
        return {d.key: d.default if d.default in d.choices else d.choices[0] for d in self.space}

    def smallest_bytes(self) -> float:
        """About the smallest file that the space can reach: every dimension at its cheapest choice."""
        scale = np.ones(len(self.table))
        for scaler in self.scalers.values():
            scale[scaler.rows] *= scaler.factors[scaler.factors.sum(1).argmin()]
        return self.header_bytes + float((self.table.min(1) * scale).sum())
