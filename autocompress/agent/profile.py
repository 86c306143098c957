"""What is known before the first trial: the effect and the bytes of every choice, measured alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.model.anatomy import Anatomy, Layer, Memberships
from autocompress.recipe import MODEL, Choice
from autocompress.space import BoundDimension, BoundSpace
from autocompress.techniques.base import structures

Chosen = Mapping[str, Choice]
"""key ("site:dimension") -> choice, complete: one for every dimension of the space."""
Floats = NDArray[np.float64]
Places = NDArray[np.intp]
_LEAST = 1e-6
"""Share of a row's bytes that is left of what was dropped: never zero, so that it can be divided by."""


@dataclass(frozen=True)
class Own:
    """Dimensions that have their share in the combinations of a row.

    at, rows: int [n], where they stand in the space, and the row of each. strides: int [n], the next choice is so many
    combinations further on. digits: int [n, combinations], the choice in each.
    """

    at: Places
    rows: Places
    strides: Places
    digits: Places


@dataclass(frozen=True)
class Scalers:
    """Dimensions that scale the bytes of rows, a line for each pair of one and a row that it scales.

    at: int [scalers], where they stand in the space. first: int [scalers + 1], the first pair of each. of, rows: int
    [pairs]. factors: float64 [pairs, choices], each above zero; one beyond the choices of a dimension.
    """

    at: Places
    first: Places
    of: Places
    rows: Places
    factors: Floats


class Profile:
    """Predicts the bytes of any recipe and holds the effects of single choices.

    effects: key -> str(choice) -> rise of the output distance. at: key -> where it stands in the space. The bytes of a
    file are those of its header and of rows (one a layer, and one for all vectors that the same channels shape). table:
    float64 [rows, combinations], bytes of a row for each combination of its own choices, coded without training; rows
    with fewer combinations are filled up with infinity. own, scalers: what dimensions do to the rows. Dimensions in
    neither change no bytes.
    """

    def __init__(self, space: BoundSpace, anatomy: Anatomy, measured: Mapping[str, Any]) -> None:
        self.space = space
        self.effects: dict[str, dict[str, float]] = {k: dict(v) for k, v in measured["effects"].items()}
        self.header_bytes = float(measured["header_bytes"])
        self.dimensions: dict[str, BoundDimension] = {d.key: d for d in space}
        self.at = {key: i for i, key in enumerate(self.dimensions)}
        self.places = {d.key: {choice: i for i, choice in enumerate(d.choices)} for d in space}
        rows = _Rows(space)
        for layer in anatomy.layers:
            rows.add_layer(layer, measured)
        rows.add_vectors(anatomy, measured["vector_bytes"])
        self.table, self.own, self.scalers = rows.table(), rows.own(), rows.scalers()

    @cached_property
    def effect_table(self) -> Floats:
        """The effects as float64 [dimensions, choices], 0 where nothing was measured, infinite beyond the choices."""
        table = np.full((len(self.space), max((len(d.choices) for d in self.space), default=1)), math.inf)
        for line, d in zip(table, self.space, strict=True):
            line[: len(d.choices)] = [self.effects.get(d.key, {}).get(str(choice), 0.0) for choice in d.choices]
        return table

    def place(self, chosen: Chosen) -> Places:
        """int [dimensions]: where the choices of a recipe stand among those of their dimensions."""
        return _places(places[chosen[key]] for key, places in self.places.items())

    def combinations(self, place: Places) -> Places:
        """int [rows]: the combination that each row has in a recipe."""
        combinations = np.zeros(len(self.table), np.intp)
        np.add.at(combinations, self.own.rows, self.own.strides * place[self.own.at])
        return combinations

    def scale(self, place: Places) -> Floats:
        """float64 [rows]: what other dimensions multiply the bytes of each row by."""
        scale, known = np.ones(len(self.table)), self.scalers
        np.multiply.at(scale, known.rows, known.factors[np.arange(len(known.of)), place[known.at[known.of]]])
        return scale

    def predict(self, chosen: Chosen) -> float:
        """Bytes of the file of this recipe, before any training."""
        place = self.place(chosen)
        rows = self.table[np.arange(len(self.table)), self.combinations(place)] * self.scale(place)
        return self.header_bytes + float(rows.sum())

    def default(self) -> dict[str, Choice]:
        """The lightest recipe of the space."""
        return {d.key: d.default if d.default in d.choices else d.choices[0] for d in self.space}

    def smallest_bytes(self) -> float:
        """About the smallest file that the space can reach: every dimension at its cheapest choice."""
        place, known = np.zeros(len(self.space), np.intp), self.scalers
        spent = np.add.reduceat(known.factors, known.first[:-1])
        place[known.at] = np.where(np.isfinite(self.effect_table[known.at]), spent, np.inf).argmin(1)
        return self.header_bytes + float((self.table.min(1) * self.scale(place)).sum())


class _Rows:
    """Collects the rows of a profile, and what each dimension does to them: its stride in the combinations of a row, or
    the factors that it scales rows by."""

    def __init__(self, space: BoundSpace) -> None:
        self._space, self._dimensions = space, {d.key: d for d in space}
        self._at = {key: i for i, key in enumerate(self._dimensions)}
        self._rows: list[list[float]] = []
        self._strides: list[tuple[str, int, int]] = []
        self._factors: dict[str, dict[int, Floats]] = {}

    def add_layer(self, layer: Layer, measured: Mapping[str, Any]) -> None:
        # the order of the keys is the order in which the table was measured, the last one fastest
        self._add([*measured["layer_bytes"][layer.name].values()], layer.groups)
        stride = 1
        for d in reversed([d for d in self._space if d.site == layer.name and d.name not in structures()]):
            self._strides.append((d.key, len(self._rows) - 1, stride))
            stride *= len(d.choices)
        for key, left in measured["weights_left"].items():
            shares = [left[str(choice)].get(layer.name, 1.0) for choice in self._dimensions[key].choices]
            if min(shares) < 1:
                self._scale(key, np.array(shares))

    def add_vectors(self, anatomy: Anatomy, size_bytes: Mapping[str, float]) -> None:
        """One row for all that the same channels shape. size_bytes: of all vectors together, by their format."""
        formats = np.array([*size_bytes.values()])
        total = max(1, sum(count for count, _ in anatomy.vectors))
        counts: dict[Memberships, int] = {}
        for count, groups in anatomy.vectors:
            counts[groups] = counts.get(groups, 0) + count
        for groups, count in counts.items():
            self._add([float(formats[0]) * count / total], groups)
            if f"{MODEL}:vectors" in self._dimensions and formats[0]:  # not if all are constant
                self._scale(f"{MODEL}:vectors", formats / formats[0])

    def _add(self, size_bytes: list[float], groups: Memberships) -> None:
        """A row, which is scaled by the channels that are kept of these groups."""
        self._rows.append(size_bytes)
        for group, part in groups:
            key = f"{group}:channels"
            if key in self._dimensions:
                self._scale(key, 1 - part * (1 - np.array(self._dimensions[key].choices, np.float64)))

    def _scale(self, key: str, by: Floats) -> None:
        """The last row, by the choices of a dimension."""
        known, row = self._factors.setdefault(key, {}), len(self._rows) - 1
        known[row] = known.get(row, np.ones(len(by))) * by

    def table(self) -> Floats:
        table = np.full((len(self._rows), max(map(len, self._rows))), math.inf)
        for line, row in zip(table, self._rows, strict=True):
            line[: len(row)] = row
        return table

    def own(self) -> Own:
        each = np.arange(max(map(len, self._rows)))
        return Own(
            _places(self._at[key] for key, _, _ in self._strides),
            _places(row for _, row, _ in self._strides),
            _places(stride for _, _, stride in self._strides),
            _places(each // stride % len(self._dimensions[key].choices) for key, _, stride in self._strides).reshape(
                -1, len(each)
            ),
        )

    def scalers(self) -> Scalers:
        pairs = [(row, by) for known in self._factors.values() for row, by in known.items()]
        of = np.repeat(np.arange(len(self._factors)), [len(known) for known in self._factors.values()])
        padded = np.ones((len(pairs), max((len(d.choices) for d in self._space), default=1)))
        for factor, (_, by) in zip(padded, pairs, strict=True):
            factor[: len(by)] = np.maximum(by, _LEAST)
        first = np.searchsorted(of, np.arange(len(self._factors) + 1))
        return Scalers(
            _places(self._at[key] for key in self._factors), first, of, _places(row for row, _ in pairs), padded
        )


def _places(places: Iterable[Any]) -> Places:
    return np.array(list(places), np.intp)
