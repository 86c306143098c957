"""A search without training: files and accuracies follow from the recipe by a formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.agent.profile import Profile
from autocompress.agent.study import SearchStudy
from autocompress.front import Base
from autocompress.recipe import Recipe
from autocompress.space import SearchSpace
from autocompress.trial.workshop import TrialResult, TrialSpec, Workshop
from tests.conftest import small_digits

BASE_ACCURACY = 0.95
BASE = Base(10_000, BASE_ACCURACY, BASE_ACCURACY)


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Effects and bytes measured on the trained perceptron."""
    task = small_digits()
    folder = tmp_path_factory.mktemp("profile")
    workshop = Workshop(task, task.build(), SearchSpace.named("default"), folder, 0)
    return Profile(workshop.space, workshop.anatomy, workshop.base_profile())


Outcome = Callable[[TrialSpec], TrialResult]


@pytest.fixture
def outcome(profile: Profile) -> Outcome:
    def run(spec: TrialSpec) -> TrialResult:
        chosen = profile.default() | Recipe.from_json(spec.recipe).as_dict()
        size = round(profile.predict(chosen) * 0.9)
        damage = sum(profile.effects[key][str(chosen[key])] for key in profile.effects)
        return TrialResult(size, BASE_ACCURACY - 0.3 * damage / (1 + damage), float(size), 0.1)

    return run


def drive(study: SearchStudy, outcome: Outcome) -> None:
    """What the engine does, in line."""
    while (spec := study.ask()) is not None:
        study.tell(spec.number, outcome(spec))


def folder_of(base: Path, name: str) -> Path:
    (base / name).mkdir()
    return base / name
