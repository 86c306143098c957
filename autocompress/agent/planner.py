"""From effects and bytes to recipes: the least distortion for a given size.

A multiple-choice knapsack: each layer picks one combination of its choices, each channel group one share, and
so on. For a price per byte all layers at once pick what has least effect + price x bytes (Lagrangian bit
allocation, Shoham and Gersho, 1988); groups, which share layers, follow one after the other (coordinate descent).
The price is found by bisection on the predicted bytes. What is left below the target is filled with the
single changes that gain most effect a byte: between two prices lie recipes that no price picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.agent.profile import Floats, Profile
from autocompress.recipe import Choice

Effects = Mapping[str, Mapping[str, float]]
Allowed = Mapping[str, tuple[Choice, ...]]
_SWEEPS, _HALVINGS, _HIGHEST = 3, 20, 1e6
_CLOSE = 0.002
"""Share of the target that is left to be filled."""


def plan(
    profile: Profile, effects: Effects, target_bytes: float, start: Mapping[str, Choice], allowed: Allowed
) -> dict[str, Choice]:
    """The recipe of least total effect whose predicted bytes are at most `target_bytes`.

    start: the point to leave from; what is not in `allowed` stays as there. When even the heaviest allowed
    choices are larger than the target, these are returned.
    """
    knapsack = _Knapsack(profile, effects, start, allowed)
    low, high = 0.0, 1e-9
    while knapsack.pick(high) > target_bytes and high < _HIGHEST:
        low, high = high, high * 10
    best = knapsack.copy()
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5 if low else high / 2
        left = target_bytes - knapsack.pick(middle)
        if left < 0:
            low = middle
        else:
            high, best = middle, knapsack.copy()
            if left <= _CLOSE * target_bytes:
                break
    best.fill(target_bytes)
    return best.chosen()


class _Knapsack:
    """A recipe that moves. combination: int [rows]. place: key -> choice of each dimension that scales rows or
    changes no bytes."""

    def __init__(self, profile: Profile, effects: Effects, start: Mapping[str, Choice], allowed: Allowed) -> None:
        table = profile.table
        self.profile, self.rows = profile, np.arange(len(table))
        self.effect = np.where(np.isfinite(table), 0.0, np.inf)
        """float64 [rows, combinations]; infinite where a choice is not allowed."""
        self.bytes = np.where(np.isfinite(table), table, 0.0)
        self.effects: dict[str, Floats] = {}
        self.place: dict[str, int] = {}
        for key, dimension in profile.dimensions.items():
            known, offered = effects.get(key, {}), allowed.get(key, (start[key],))
            costs = np.array([known.get(str(c), 0.0) if c in offered else np.inf for c in dimension.choices])
            if key in profile.own:
                own = profile.own[key]
                self.effect[own.row] += costs[own.digits]
            else:
                self.effects[key] = costs
                self.place[key] = profile.places[key][start[key]]
                if key not in profile.scalers and key in allowed:
                    self.place[key] = int(costs.argmin())
        self.combination = profile.combinations(start)
        self.scale = profile.scale(start)
        self.scalers = _Stacked(profile, self.effects)

    def copy(self) -> _Knapsack:
        twin: _Knapsack = object.__new__(_Knapsack)
        vars(twin).update(vars(self))
        twin.combination, twin.place, twin.scale = self.combination.copy(), dict(self.place), self.scale.copy()
        return twin

    def chosen(self) -> dict[str, Choice]:
        """key -> choice, for every dimension."""
        places = {key: own.digits[self.combination[own.row]] for key, own in self.profile.own.items()}
        return {key: d.choices[places.get(key, self.place.get(key, 0))] for key, d in self.profile.dimensions.items()}

    def total(self) -> float:
        """Predicted bytes."""
        return self.profile.header_bytes + float((self.bytes[self.rows, self.combination] * self.scale).sum())

    def pick(self, price: float) -> float:
        """Move to what has least effect + price x bytes; the predicted bytes there."""
        for _ in range(_SWEEPS):
            before = self.combination, dict(self.place)
            self.combination = (self.effect + price * self.scale[:, None] * self.bytes).argmin(1)
            now = self.bytes[self.rows, self.combination] * self.scale
            present = self.scalers.present(self.place)
            costs = self.scalers.effects + price * self.scalers.bytes(present, now)
            for i in np.flatnonzero(costs.argmin(1) != present):
                key, scaler = self.scalers.keys[i], self.profile.scalers[self.scalers.keys[i]]
                factors = scaler.factors / scaler.factors[self.place[key]]
                self._move(key, int((self.effects[key] + price * (factors @ now[scaler.rows])).argmin()), now)
            if self.place == before[1] and np.array_equal(self.combination, before[0]):
                break
        return self.total()

    def _move(self, key: str, place: int, now: Floats) -> None:
        if place != self.place[key]:
            scaler = self.profile.scalers[key]
            ratio = scaler.factors[place] / scaler.factors[self.place[key]]
            self.scale[scaler.rows] *= ratio
            now[scaler.rows] *= ratio
            self.place[key] = place

    def fill(self, target_bytes: float) -> None:
        """Take single changes of less effect while they fit, those of most effect a byte first."""
        for _ in range(len(self.rows) + len(self.place)):
            room = target_bytes - self.total()
            now = self.bytes[self.rows, self.combination] * self.scale
            gain = self.effect[self.rows, self.combination][:, None] - self.effect
            more = self.bytes * self.scale[:, None] - now[:, None]
            worth = _worth(gain, more, room)
            row, combination = np.unravel_index(worth.argmax(), worth.shape)
            best = float(worth[row, combination])
            present = self.scalers.present(self.place)
            costs, spent, each = self.scalers.effects, self.scalers.bytes(present, now), np.arange(len(present))
            worth = _worth(costs[each, present][:, None] - costs, spent - spent[each, present][:, None], room)
            if max(best, worth.max(initial=0.0)) <= 0:
                return
            if worth.max(initial=0.0) > best:
                scaler, place = np.unravel_index(worth.argmax(), worth.shape)
                self._move(self.scalers.keys[scaler], int(place), now)
            else:
                self.combination[row] = combination


class _Stacked:
    """All scalers in one array, a line for each pair of a scaler and a row that it scales. factors: float64
    [pairs, choices]. effects: float64 [scalers, choices]; infinite beyond the choices of a scaler."""

    def __init__(self, profile: Profile, effects: Mapping[str, Floats]) -> None:
        self.keys, scalers = [*profile.scalers], [*profile.scalers.values()]
        choices = max((len(s.factors) for s in scalers), default=1)
        self.rows = np.concatenate([np.zeros(0, np.intp), *(s.rows for s in scalers)])
        self.of = np.repeat(np.arange(len(scalers)), [len(s.rows) for s in scalers])
        self.first = np.searchsorted(self.of, np.arange(len(scalers)))
        self.factors, self.effects = np.ones((len(self.rows), choices)), np.full((len(scalers), choices), np.inf)
        for i, (key, first, scaler) in enumerate(zip(self.keys, self.first, scalers, strict=True)):
            choices, rows = scaler.factors.shape
            self.factors[first : first + rows, :choices] = scaler.factors.T
            self.effects[i, :choices] = effects[key]

    def present(self, place: Mapping[str, int]) -> NDArray[np.intp]:
        """int [scalers]: the choice that each has."""
        return np.array([place[key] for key in self.keys], np.intp)

    def bytes(self, present: NDArray[np.intp], now: Floats) -> Floats:
        """float64 [scalers, choices]: of the rows that each scales, by its choice. now: bytes [rows]."""
        unscaled = now[self.rows] / self.factors[np.arange(len(self.rows)), present[self.of]]
        spent: Floats = np.add.reduceat(self.factors * unscaled[:, None], self.first)
        return spent


def _worth(gain: Any, more: Any, room: float) -> Any:
    """Effect that is saved for each byte more; nothing where it does not fit."""
    return np.where((gain > 1e-12) & np.isfinite(gain) & (more <= room), gain / np.maximum(more, 1e-3), 0.0)
