"""A trial as the frontier sampler knows it: proposed, stopped at a rung, or finished."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial

from autocompress.agent.forecast import MOVES
from autocompress.front import non_dominated
from autocompress.recipe import Choice
from autocompress.space import without_void
from autocompress.techniques.base import structures

_TOLD = ("move", "target_bytes", "predicted_bytes", "expected_accuracy", "deviation")
ATTRIBUTES = ("parent", *_TOLD)
"""User attributes of a trial that record its proposal."""


def is_permanent(dimension: str) -> bool:
    """Whether its choices take something away for good."""
    technique = structures().get(dimension)
    return technique is not None and technique.permanent


def rebuilds(dimension: str) -> bool:
    """Whether its choices take something away for good, in ways that shapes alone do not tell."""
    return is_permanent(dimension) and structures()[dimension].restores


class Point:
    """A finished trial. keys: of the space; what a foreign study asks beside them is ignored.

    chosen: the recipe. reached: what the weights amount to, as a price of bits prunes more than the recipe asks.
    rungs: user attribute -> accuracy at that rung. effects: key -> str(choice) -> effect probed at its own weights.
    trained: how often it was trained on, one time after the other.
    """

    def __init__(self, trial: FrozenTrial, keys: Container[str]) -> None:
        told = trial.user_attrs
        self.number = trial.number
        self.size: float = trial.values[0]
        self.accuracy: float = trial.values[1]
        self.chosen = _inside(trial.params, keys)
        self.reached = self.chosen | _inside(told.get("reached", {}), keys)
        self.rungs = _rungs(trial)
        self.effects: dict[str, dict[str, float]] = told.get("effects", {})
        self.parent: int | None = told.get("parent")
        self.move: str = told.get("move", MOVES[0])
        self.trained = 0

    def as_asked(self, chosen: Mapping[str, Choice]) -> dict[str, Choice]:
        """A child's choices; what the weights came to by themselves need not be asked of them."""
        return {key: self.chosen[key] if choice == self.reached[key] else choice for key, choice in chosen.items()}

    @cached_property
    def rebuilt(self) -> list[tuple[str, str]]:
        """(dimension, site) of the parts that are not as they were."""
        made = [(key.rpartition(":")[2], key.rpartition(":")[0], c) for key, c in without_void(self.chosen).items()]
        return [(name, site) for name, site, c in made if rebuilds(name) and c != structures()[name].default]


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those that are not dominated, largest first."""
    keep = non_dominated([(p.size, p.accuracy) for p in points])
    return sorted((points[i] for i in keep), key=lambda p: -p.size)


@dataclass(frozen=True)
class Stopped:
    """A trial that was stopped at a rung. size: the bytes that it was to have. accuracy: at the rung."""

    chosen: dict[str, Choice]
    move: str
    parent: int
    size: float
    rung: str
    accuracy: float

    @staticmethod
    def of(trial: FrozenTrial, keys: Container[str]) -> Stopped | None:
        """None for a trial that began from the original, or was stopped by someone else."""
        told, rungs = trial.user_attrs, _rungs(trial)
        if told.get("parent") is None or told.get("predicted_bytes") is None or not rungs:
            return None
        rung = [*rungs][-1]
        chosen = _inside(trial.params, keys)
        return Stopped(chosen, told["move"], told["parent"], told["predicted_bytes"], rung, rungs[rung])


@dataclass
class Proposal:
    """A candidate, and why it is one.

    chosen: the recipe, None until it is planned. target_bytes: aimed at. expected_accuracy, deviation: the forecast,
    and the standard deviation of the logarithm of what the accuracy lacks about it; None where nothing was forecast.
    """

    move: str
    parent: Point | None
    target_bytes: float
    chosen: dict[str, Choice] | None = None
    predicted_bytes: float = 0.0
    expected_accuracy: float | None = None
    deviation: float | None = None

    def attributes(self) -> dict[str, Any]:
        """User attributes of its trial."""
        return {"parent": self.parent.number if self.parent else None, **{name: getattr(self, name) for name in _TOLD}}


def identity(attributes: Mapping[str, Any]) -> tuple[str, int | None, float]:
    """Equal for proposals of the same trial. Training a file on is one trial, whatever bytes are predicted by now."""
    move = attributes["move"]
    return move, attributes["parent"], 0.0 if move == "train" else attributes["target_bytes"]


def _inside(params: Mapping[str, Choice], keys: Container[str]) -> dict[str, Choice]:
    return {key: choice for key, choice in params.items() if key in keys}


def _rungs(trial: FrozenTrial) -> dict[str, float]:
    return {name: float(value) for name, value in trial.user_attrs.items() if name.startswith("rung_")}
