"""Learning rates are tried on one heavy recipe, from the task's own rate on, as long as that pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.agent.profile import Profile
from autocompress.agent.race import RACE
from autocompress.agent.sampler import FrontierSampler
from autocompress.agent.study import SearchStudy
from autocompress.recipe import Recipe
from autocompress.trial.workshop import TrialResult, TrialSpec
from tests.agent.conftest import BASE_ACCURACY, Outcome

KEY = "model:learning_rate"


@pytest.fixture
def study(profile: Profile, tmp_path: Path) -> SearchStudy:
    return SearchStudy(tmp_path, profile.space, 30, FrontierSampler(profile, 30, BASE_ACCURACY))


def world(outcome: Outcome, best: float) -> Callable[[TrialSpec], TrialResult]:
    """In which a learning rate is the worse, the further it is from the best."""

    def run(spec: TrialSpec) -> TrialResult:
        rate = Recipe.from_json(spec.recipe).as_dict().get(KEY, 1.0)
        assert isinstance(rate, float)
        result = outcome(spec)
        return replace(result, val_accuracy=result.val_accuracy - 0.04 * abs(math.log2(rate / best)))

    return run


def raced(study: SearchStudy) -> list[float]:
    return [t.params[KEY] for t in study.trials() if t.user_attrs["move"] == RACE]


@pytest.mark.parametrize(
    ("best", "tried"),
    [(1.0, [2, 4, 1, 0.5]), (2.0, [2, 4, 1]), (4.0, [2, 4, 8]), (16.0, [2, 4, 8, 16]), (0.5, [2, 4, 1, 0.5, 0.25])],
)
def test_the_race_climbs_as_long_as_it_pays(
    best: float, tried: list[float], study: SearchStudy, outcome: Outcome
) -> None:
    run = world(outcome, best)
    while (spec := study.ask()) is not None:
        study.tell(spec.number, run(spec))
    assert raced(study) == tried
    recipes = [{k: v for k, v in t.params.items() if k != KEY} for t in study.trials()[: len(tried)]]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert all(t.user_attrs["parent"] is None for t in study.trials()[: len(tried)])
    later = study.trials()[len(tried) :]
    by_size = [t.params[KEY] for t in sorted(later, key=lambda t: t.user_attrs["target_bytes"])]
    assert by_size[0] == best, "heavy files are trained at the rate that won"
    assert by_size[-1] == min(best, 1.0), "light ones at the task's own, or at less where even heavy ones want less"
    assert later[0].user_attrs["parent"] is None, "the walk begins at the original"


def test_workers_do_not_wait_for_the_race(study: SearchStudy, outcome: Outcome) -> None:
    first = [study.ask() for _ in range(3)]
    assert [study.get(spec.number).params[KEY] for spec in first if spec] == [2, 4, 1]
    assert study.get(2).user_attrs["move"] == "step"
    run = world(outcome, 1.0)
    for spec in first[:2]:
        assert spec is not None
        study.tell(spec.number, run(spec))
    study.ask()
    assert raced(study) == [2, 4, 1]


def test_of_many_workers_up_to_half_race(study: SearchStudy, outcome: Outcome) -> None:
    first = [study.ask() for _ in range(8)]
    assert raced(study) == [2, 4, 1, 0.5]
    run = world(outcome, 1.0)
    for spec in first:
        assert spec is not None
        study.tell(spec.number, run(spec))
    later = [study.ask() for _ in range(8)]
    assert raced(study) == [2, 4, 1, 0.5], "it is over"
    rates = {study.get(spec.number).params[KEY] for spec in later if spec}
    assert rates == {1.0}


def test_a_rate_at_which_training_fails_has_lost(study: SearchStudy, outcome: Outcome) -> None:
    while (spec := study.ask()) is not None:
        if study.get(spec.number).params[KEY] > 1:
            study.fail(spec.number, "Traceback\nthe loss became nan")
        else:
            study.tell(spec.number, replace(outcome(spec), val_accuracy=0.8))
    assert raced(study) == [2, 2, 4, 4, 1, 0.5], "once more each, for it may have failed of something else"
    assert all(t.params[KEY] <= 1 for t in study.trials()[6:])


def test_a_recipe_that_fails_is_not_raced_again(study: SearchStudy, outcome: Outcome) -> None:
    run, recipes = world(outcome, 1.0), list[str]()
    while (spec := study.ask()) is not None and len(recipes) < 5:
        recipes.append(str({key: choice for key, choice in study.get(spec.number).params.items() if key != KEY}))
        if recipes[-1] == recipes[0]:
            study.fail(spec.number, "Traceback\nno such layer")
        else:
            study.tell(spec.number, run(spec))
    assert recipes.count(recipes[0]) == 1
    assert raced(study)[:5] == [2, 2, 4, 1, 0.5]


def test_small_budgets_guess_instead_of_a_race(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = SearchStudy(tmp_path, profile.space, 12, FrontierSampler(profile, 12, BASE_ACCURACY))
    while (spec := study.ask()) is not None:
        study.tell(spec.number, outcome(spec))
    assert raced(study) == []
    by_size = [t.params[KEY] for t in sorted(study.trials(), key=lambda t: t.user_attrs["target_bytes"])]
    assert set(by_size) == {1.0, 2.0, 4.0}
    assert by_size == sorted(by_size, reverse=True), (
        "heavy files are trained at twice the task's rate, and the heaviest at four times"
    )
