"""What a child will be, predicted from the parents and children so far.

A proxy that is measured without training does not know what fine-tuning repairs; the pairs of a search do.
Bayesian linear regression with a conjugate prior (Gelman et al., 2013, chapter 14): how much more or less a child
lacks in accuracy than its parent, on the step that was taken. The prior is what is believed before the first pair.
Children of one parent have part of what they are off by in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.agent.profile import Floats
from autocompress.recipe import Choice

Pair = tuple[Mapping[str, Choice], Mapping[str, Choice], float]
_BELIEF = (0.0, 0.3, 0.2, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1, -0.07)
"""Coefficients: half the bytes cost half as much again, more the smaller the model; training on wins the more, the
more is lacking, and less each time."""
_SCATTER = {"step": 0.3, "train": 0.1, "cross": 0.15, "rebuild": 0.3}
"""Deviation from it that is expected of a child, by its move: plan a smaller recipe; train on; cross with a neighbour;
change the structure of one part."""
MOVES = tuple(_SCATTER)
_DOUBT, _TRUST, _SHARED = 0.3, 3.0, 0.5
"""Deviation of a coefficient; pairs that the scatter of a move counts as; share of its variance that all children of a
parent have in common: an accuracy that was good luck is not inherited."""
_RIDGE, _FAR = 0.5, math.log(3)
"""Of the regression of bytes; and the largest change of a factor that is believed, as a logarithm."""
_LATEST = 2000
"""Pairs that are learned from."""


@dataclass(frozen=True)
class Step:
    """From a parent to a child. halvings: log2 of parent over child bytes. level: log2 of the original's over the
    parent's bytes. lacking: of the parent's accuracy to the ceiling, in what the original's lacks. trained: how often
    the parent itself was trained on. parent: its number."""

    move: str
    halvings: float
    level: float
    lacking: float
    trained: int
    parent: int

    def features(self) -> list[float]:
        down, log, level = max(self.halvings, 0.0), math.log(self.lacking), (self.level - 5) / 3
        kinds = [float(self.move == move) for move in MOVES[1:]]
        return [1.0, down, down**2, log, down * log, level, down * level, *kinds, kinds[0] * log / (1 + self.trained)]


class Forecast:
    """pairs: (step, what the child's accuracy lacked, in what the original's lacks)."""

    def __init__(self, pairs: Sequence[tuple[Step, float]]) -> None:
        belief, latest = np.array(_BELIEF), pairs[-_LATEST:]
        x = np.array([step.features() for step, _ in latest]).reshape(-1, len(belief))
        y = np.array([math.log(lacked / step.lacking) for step, lacked in latest]) - x @ belief
        moves = np.array([MOVES.index(step.move) for step, _ in latest], np.intp)
        siblings = _Siblings([step.parent for step, _ in latest])
        prior = self._scatter = np.array([*_SCATTER.values()])
        for _ in range(2):
            unit = self._scatter[moves]
            alone, left = siblings.alone(x / unit[:, None]), siblings.alone(y / unit)
            self._covariance = np.linalg.inv(alone.T @ alone + np.eye(len(belief)) / _DOUBT**2)
            learned = self._covariance @ (alone.T @ left)
            off = y - x @ learned
            self._parents = siblings.in_common(off / unit)
            better = off < 0  # a child that failed altogether tells nothing of how much better others may be
            squares = np.bincount(moves[better], off[better] ** 2, len(MOVES))
            known = np.bincount(moves[better], minlength=len(MOVES))
            self._scatter = np.sqrt((_TRUST * prior**2 + squares) / (_TRUST + known))
        self._coefficients = belief + learned

    def __call__(self, steps: Sequence[Step]) -> tuple[Floats, Floats]:
        """(mean, deviation), float64 [n]: of the logarithm of what each child's accuracy will lack."""
        x = np.array([step.features() for step in steps])
        scatter = self._scatter[[MOVES.index(step.move) for step in steps]]
        common, left = np.array([self._parents.get(step.parent, (0.0, 1.0)) for step in steps]).T
        mean = np.log([step.lacking for step in steps]) + x @ self._coefficients + scatter * common
        return mean, np.sqrt(scatter**2 * left + ((x @ self._covariance) * x).sum(1))


class _Siblings:
    """Children by the numbers of their parents: random effects, of a known share of the variance (Swamy and Arora,
    1972)."""

    def __init__(self, parents: Sequence[int]) -> None:
        self._parents, self._of, self._counts = np.unique(parents, return_inverse=True, return_counts=True)
        self._own = (1 - _SHARED) / (1 - _SHARED + _SHARED * self._counts)
        """Share of the variance of a parent's mean child that is not in common."""

    def alone(self, values: Floats) -> Floats:
        """float64, as `values` ([n] or [n, k]): less what siblings have in common, so independent of each other."""
        shares = (1 - np.sqrt(self._own)).reshape(-1, *[1] * (values.ndim - 1))
        left: Floats = (values - (shares * self._mean(values))[self._of]) / math.sqrt(1 - _SHARED)
        return left

    def in_common(self, off: Floats) -> dict[int, tuple[float, float]]:
        """Number of a parent -> (what its children are off by, share of the variance that is left)."""
        common, left = (1 - self._own) * self._mean(off), 1 - _SHARED + _SHARED * self._own
        return dict(zip(self._parents.tolist(), zip(common.tolist(), left.tolist(), strict=True), strict=True))

    def _mean(self, values: Floats) -> Floats:
        total = np.zeros((len(self._counts), *values.shape[1:]))
        np.add.at(total, self._of, values)
        mean: Floats = total / self._counts.reshape(-1, *[1] * (values.ndim - 1))
        return mean


class BytesForecast:
    """What training makes of the predicted bytes: file over prediction, of a child against its parent's.

    Ridge regression of its logarithm on the training choices that were changed. pairs: (choices of the parent, of the
    child, logarithm of the factor), choices by key.
    """

    def __init__(self, choices: Mapping[str, Sequence[Choice]], pairs: Sequence[Pair]) -> None:
        self._columns = {(key, c): i for i, (key, c) in enumerate((k, c) for k, cs in choices.items() for c in cs)}
        latest = pairs[-_LATEST:]
        x = np.array([self._change(before, after) for before, after, _ in latest]).reshape(-1, 1 + len(self._columns))
        y = np.clip([factor for *_, factor in latest], -_FAR, _FAR)
        self._coefficients = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y)

    def _change(self, before: Mapping[str, Choice], after: Mapping[str, Choice]) -> Floats:
        row = np.zeros(1 + len(self._columns))
        row[0] = 1.0
        for key in {key for key, _ in self._columns}:
            row[1 + self._columns[key, after[key]]] += 1.0
            row[1 + self._columns[key, before[key]]] -= 1.0
        return row

    def __call__(self, before: Mapping[str, Choice], after: Mapping[str, Choice]) -> float:
        """The factor that is expected."""
        return math.exp(min(max(float(self._change(before, after) @ self._coefficients), -_FAR), _FAR))
