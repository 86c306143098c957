"""From effects and bytes to recipes: the least distortion for a given size.

A multiple-choice knapsack: each layer picks one combination of its choices, each channel group one share, and
so on. For a price per byte all layers at once pick what has least effect + price x bytes (Lagrangian bit
allocation, Shoham and Gersho, 1988); groups, which share layers, follow one after the other (coordinate descent).
The price is found by bisection on the predicted bytes. What is left below the target is filled with the
single changes that gain most effect a byte, as far as they are worth it: between two prices lie recipes that no price
picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autocompress.agent.profile import Floats, Places, Profile
from autocompress.recipe import Choice

Allowed = Mapping[str, tuple[Choice, ...]]
_SWEEPS, _HALVINGS, _HIGHEST = 3, 20, 1e6
_CLOSE = 0.002
"""Share of the target that is left to be filled."""
_WORTH_IT = 0.05
"""Of the price, what a change must gain a byte: or a file is filled up with bits that do no good."""


def plan(
    profile: Profile, effects: Floats, target_bytes: float, start: Mapping[str, Choice], allowed: Allowed
) -> dict[str, Choice]:
    """The recipe of least total effect whose predicted bytes are at most `target_bytes`, less what would do no good.

    effects: float64 [dimensions, choices]. start: the point to leave from; what is not in `allowed` stays as there.
    When even the heaviest allowed choices are larger than the target, these are returned.
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
    best.fill(target_bytes, _WORTH_IT * high)
    return best.chosen()


class _Knapsack:
    """A recipe that moves. combination: int [rows]. place: int [dimensions], the choice of each that scales rows or
    changes no bytes."""

    def __init__(self, profile: Profile, effects: Floats, start: Mapping[str, Choice], allowed: Allowed) -> None:
        self.profile, self.own, self.scalers = profile, profile.own, profile.scalers
        self.rows = np.arange(len(profile.table))
        self.place = profile.place(start)
        offered = np.zeros(effects.shape, bool)
        offered[np.arange(len(effects)), self.place] = True
        for line, (key, places) in zip(offered, profile.places.items(), strict=True):
            if key in allowed:
                line[:] = False
                line[[places[choice] for choice in allowed[key]]] = True
        costs = np.where(offered, effects, np.inf)
        self.effect = np.where(np.isfinite(profile.table), 0.0, np.inf)
        """float64 [rows, combinations]; infinite where a choice is not allowed."""
        np.add.at(self.effect, self.own.rows, costs[self.own.at[:, None], self.own.digits])
        self.bytes = np.where(np.isfinite(profile.table), profile.table, 0.0)
        self.combination, self.scale = profile.combinations(self.place), profile.scale(self.place)
        self.scaling = costs[self.scalers.at]
        """float64 [scalers, choices], as `effect`."""
        free = np.delete(np.arange(len(costs)), [*self.own.at, *self.scalers.at])
        self.place[free] = costs[free].argmin(1)

    def copy(self) -> _Knapsack:
        twin: _Knapsack = object.__new__(_Knapsack)
        vars(twin).update(vars(self))
        twin.combination, twin.place, twin.scale = self.combination.copy(), self.place.copy(), self.scale.copy()
        return twin

    def chosen(self) -> dict[str, Choice]:
        """key -> choice, for every dimension."""
        place, own = self.place.copy(), self.own
        place[own.at] = own.digits[np.arange(len(own.at)), self.combination[own.rows]]
        return {d.key: d.choices[at] for d, at in zip(self.profile.space, place, strict=True)}

    def total(self) -> float:
        """Predicted bytes."""
        return self.profile.header_bytes + float((self.bytes[self.rows, self.combination] * self.scale).sum())

    def pick(self, price: float) -> float:
        """Move to what has least effect + price x bytes; the predicted bytes there."""
        for _ in range(_SWEEPS):
            before = self.combination, self.place.copy()
            self.combination = (self.effect + price * self.scale[:, None] * self.bytes).argmin(1)
            now = self.bytes[self.rows, self.combination] * self.scale
            costs = self.scaling + price * self._scaled(now)
            for scaler in np.flatnonzero(costs.argmin(1) != self.place[self.scalers.at]).tolist():
                rows, factors = self._pairs(scaler)
                place = int((self.scaling[scaler] + price * (now[rows] @ factors)).argmin())
                self._move(scaler, place, rows, factors[:, place])
                now[rows] *= factors[:, place]
            if np.array_equal(self.place, before[1]) and np.array_equal(self.combination, before[0]):
                break
        return self.total()

    def _pairs(self, scaler: int) -> tuple[Places, Floats]:
        """The rows that it scales, int [n], and by how much it would from now on, float64 [n, choices]."""
        pairs = slice(*self.scalers.first[scaler : scaler + 2])
        factors = self.scalers.factors[pairs]
        return self.scalers.rows[pairs], factors / factors[:, [self.place[self.scalers.at[scaler]]]]

    def _scaled(self, now: Floats) -> Floats:
        """float64 [scalers, choices]: bytes of the rows that each scales, by its choice. now: bytes [rows]."""
        known = self.scalers
        present = known.factors[np.arange(len(known.of)), self.place[known.at[known.of]]]
        return np.add.reduceat(known.factors * (now[known.rows] / present)[:, None], known.first[:-1])

    def _move(self, scaler: int, place: int, rows: Places, factors: Floats) -> None:
        self.scale[rows] *= factors
        self.place[self.scalers.at[scaler]] = place

    def fill(self, target_bytes: float, least: float) -> None:
        """Take single changes of less effect while they fit, those of most effect a byte first, down to the least."""
        for _ in range(len(self.rows) + len(self.place)):
            room = target_bytes - self.total()
            now = self.bytes[self.rows, self.combination] * self.scale
            gain = self.effect[self.rows, self.combination][:, None] - self.effect
            more = self.bytes * self.scale[:, None] - now[:, None]
            worth = _worth(gain, more, room)
            row, combination = np.unravel_index(worth.argmax(), worth.shape)
            best = float(worth[row, combination])
            spent, each, present = self._scaled(now), np.arange(len(self.scaling)), self.place[self.scalers.at]
            gain = self.scaling[each, present][:, None] - self.scaling
            worth = _worth(gain, spent - spent[each, present][:, None], room)
            if max(best, worth.max(initial=0.0)) <= least:
                return
            if worth.max(initial=0.0) > best:
                scaler, place = np.unravel_index(worth.argmax(), worth.shape)
                rows, factors = self._pairs(int(scaler))
                self._move(int(scaler), int(place), rows, factors[:, place])
            else:
                self.combination[row] = combination


def _worth(gain: Any, more: Any, room: float) -> Any:
    """Effect that is saved for each byte more; nothing where it does not fit."""
    return np.where((gain > 1e-12) & np.isfinite(gain) & (more <= room), gain / np.maximum(more, 1e-3), 0.0)
