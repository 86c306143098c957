"""Samplers by name: our own and the baselines of Optuna it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from autocompress.agent.profile import Profile
from autocompress.agent.sampler import FrontierSampler
from autocompress.errors import SamplerError, near_misses
from autocompress.front import Base

NAMES = ("frontier", "tpe", "nsga2", "gp", "random")


def check_sampler(name: str) -> None:
    if name not in NAMES:
        raise SamplerError(f"unknown sampler {name!r}{near_misses(name, NAMES)}")


def make_sampler(
    name: str,
    profile: Profile,
    budget: int,
    base: Base,
    seed: int,
    max_size_bytes: float | None,
    min_accuracy: float | None,
    trains: bool = True,
) -> BaseSampler:
    """Constraints focus every sampler: ours aims at them, Optuna's treat them as constraints. trains: whether trials
    fine-tune."""
    check_sampler(name)
    if name == "frontier":
        return FrontierSampler(
            profile, budget, base.val_accuracy, seed, max_size_bytes, min_accuracy, base.chance_accuracy, trains
        )
    if name == "random":
        return RandomSampler(seed=seed)
    constraints = _constraints(max_size_bytes, min_accuracy)
    if name == "tpe":
        return TPESampler(seed=seed, multivariate=True, constraints_func=constraints)
    if name == "gp":
        return GPSampler(seed=seed, constraints_func=constraints)
    return NSGAIISampler(seed=seed, population_size=max(4, min(50, budget // 4)), constraints_func=constraints)


def _constraints(
    max_size_bytes: float | None, min_accuracy: float | None
) -> Callable[[FrozenTrial], Sequence[float]] | None:
    if max_size_bytes is None and min_accuracy is None:
        return None

    def constraints(trial: FrozenTrial) -> Sequence[float]:
        size, accuracy = trial.values if trial.values else (math.inf, 0.0)
        over = math.log2(size / max_size_bytes) if max_size_bytes else 0.0
        under = min_accuracy - accuracy if min_accuracy is not None else 0.0
        return [over, under]

    return constraints
