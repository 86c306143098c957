"""All samplers through the same study; ours is held to more."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial

from autocompress.agent.aim import Aim
from autocompress.agent.moves import Moves
from autocompress.agent.profile import Profile
from autocompress.agent.race import RACE
from autocompress.agent.samplers import NAMES, check_sampler, make_sampler
from autocompress.agent.study import SearchStudy
from autocompress.agent.walk import Walk
from autocompress.errors import SamplerError
from autocompress.front import Base, hypervolume
from autocompress.recipe import Recipe
from autocompress.trial.workshop import Rung, TrialResult, TrialSpec
from tests.agent.conftest import BASE, Outcome, drive, folder_of


def study_of(folder: Path, profile: Profile, name: str, budget: int = 24, **constraints: Any) -> SearchStudy:
    settings = {"max_size_bytes": None, "min_accuracy": None, **constraints}
    sampler = make_sampler(name, profile, budget, BASE, 0, **settings)
    return SearchStudy(folder, profile.space, budget, sampler)


def values(study: SearchStudy) -> list[tuple[float, float]]:
    return [(t.values[0], t.values[1]) for t in study.complete()]


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_spends_the_budget_inside_the_space(
    name: str, profile: Profile, outcome: Outcome, tmp_path: Path
) -> None:
    budget = 14 if name == "gp" else 24  # it begins at the eleventh, and thinks for seconds
    study = study_of(tmp_path, profile, name, budget)
    drive(study, outcome)
    assert len(study.complete()) == budget
    for trial in study.complete():
        assert set(trial.params) == {d.key for d in profile.space}
        assert all(trial.params[d.key] in d.choices for d in profile.space)
    assert len({tuple(sorted(t.params.items())) for t in study.complete()}) > 12


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_asks_the_same(name: str, profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    asked = []
    for run in ("a", "b"):
        study = study_of(folder_of(tmp_path, run), profile, name, 12)
        drive(study, outcome)
        asked.append([t.params for t in study.complete()])
    assert asked[0] == asked[1]


@pytest.mark.parametrize(("unit", "chance"), [(2.0**-10, 0.0), (1000.0, -5000.0)])
def test_a_metric_of_any_scale_is_searched_alike(
    unit: float, chance: float, profile: Profile, outcome: Outcome, tmp_path: Path
) -> None:
    def scaled(spec: TrialSpec) -> TrialResult:
        result = outcome(spec)
        return replace(result, val_accuracy=chance + unit * result.val_accuracy)

    base = Base(BASE.size_bytes, chance + unit * BASE.val_accuracy, chance + unit * BASE.test_accuracy, chance)
    asked = []
    for place, (original, run) in enumerate([(BASE, outcome), (base, scaled)]):
        sampler = make_sampler("frontier", profile, 24, original, 0, None, None)
        study = SearchStudy(folder_of(tmp_path, str(place)), profile.space, 24, sampler)
        drive(study, run)
        asked.append([trial.params for trial in study.trials()])
    assert asked[0] == asked[1]


def test_ours_finds_the_better_front(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    area = {}
    for name in ("frontier", "random"):
        study = study_of(folder_of(tmp_path, name), profile, name)
        drive(study, outcome)
        area[name] = hypervolume(values(study), profile.predict(profile.default()), 0.5)
    assert area["frontier"] > 1.1 * area["random"]


def test_the_walk_goes_from_light_to_heavy_with_lineage(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, "frontier")
    drive(study, outcome)
    trials = study.complete()
    begun = [t.user_attrs["move"] for t in trials].index("step")
    walk = trials[begun : begun + 5]
    assert walk[0].user_attrs["parent"] is None
    sizes = [t.values[0] for t in walk]
    assert sizes == sorted(sizes, reverse=True)
    for trial in trials[begun + 1 :]:
        parent = trials[trial.user_attrs["parent"]]
        assert parent.number < trial.number
        for key, choice in trial.params.items():
            if key.endswith(":channels"):
                assert choice <= parent.params[key], "removed channels do not come back"


def test_the_walk_ends_where_plans_leave_nothing_of_the_original(profile: Profile) -> None:
    ends = {}
    for factor in (0.0, 0.3, 1.0, 100.0):
        felt = copy.copy(profile)
        felt.effect_table = profile.effect_table * np.where(np.isfinite(profile.effect_table), factor, 1.0)
        walk = Walk(felt, Aim(felt, BASE.val_accuracy, 0.0, None, None), 24)
        first, ends[factor], _ = walk.ends()
        if factor in (0.3, 1.0):
            moves, distances = Moves(felt, walk, None, 1.0), []
            for share in (1.01, 0.97):
                place = felt.place(moves.step([], share * ends[factor], random.Random(0), 0.0).chosen or {})
                distances.append(felt.effect_table[range(len(place)), place].sum())
            assert distances[0] <= 1 < distances[1]
    assert ends[0.0] < ends[0.3] < ends[1.0] < ends[100.0]
    assert ends[100.0] == pytest.approx(first / 4), "it leads somewhere even where hardly anything can go"


def test_a_step_asks_for_more_than_the_weights_have_come_to(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    """In this world every file has 80% zeros, whatever was asked."""
    keys = [key for key in profile.dimensions if key.endswith(":sparsity")]

    def pruned(spec: TrialSpec) -> TrialResult:
        chosen = Recipe.from_json(spec.recipe).as_dict()
        return replace(outcome(spec), reached={key: 0.8 for key in keys if chosen.get(key, 0.0) < 0.8})

    study = study_of(tmp_path, profile, "frontier")
    drive(study, pruned)
    asked = [(t, study.get(t.user_attrs["parent"])) for t in study.complete() if t.user_attrs["parent"] is not None]
    assert all(t.params[key] == parent.params[key] or t.params[key] > 0.8 for t, parent in asked for key in keys)
    assert any(t.params[key] > 0.8 for t, _ in asked for key in keys)


def test_a_target_size_focuses_the_search(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    limit = 0.06 * profile.predict(profile.default())
    near = {}
    for name, constraint in (("free", None), ("focused", limit)):
        study = study_of(folder_of(tmp_path, name), profile, "frontier", max_size_bytes=constraint)
        drive(study, outcome)
        near[name] = sum(1 for size, _ in values(study) if 0.75 * limit <= size <= limit)
    assert near["focused"] >= 2 * near["free"]
    assert near["focused"] >= 6


@pytest.mark.parametrize(("budget", "workers"), [(1, 1), (4, 2), (12, 1), (16, 16), (24, 4)])
def test_a_target_size_is_met_whatever_is_lost_there(
    budget: int, workers: int, profile: Profile, outcome: Outcome, tmp_path: Path
) -> None:
    limit = 0.006 * profile.predict(profile.default())
    study = study_of(tmp_path, profile, "frontier", budget, max_size_bytes=limit)
    running: list[TrialSpec] = []
    while len(study.complete()) < budget:
        while len(running) < workers and (spec := study.ask()):
            running.append(spec)
        spec = running.pop(0)
        study.tell(spec.number, outcome(spec))
    meeting = [accuracy for size, accuracy in values(study) if size <= limit]
    assert max(meeting) < 0.9
    assert len(meeting) >= (budget / 4 if budget > 4 * workers else 1)


def test_a_least_accuracy_focuses_the_search(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    smallest, near = {}, {}
    for name, least in (("free", None), ("focused", 0.9)):
        study = study_of(folder_of(tmp_path, name), profile, "frontier", min_accuracy=least)
        drive(study, outcome)
        smallest[name] = min(size for size, accuracy in values(study) if accuracy >= 0.9)
        near[name] = sum(1 for size, _ in values(study)[12:] if 0.5 <= size / smallest[name] <= 2)
    assert smallest["focused"] <= 1.05 * smallest["free"]
    assert near["focused"] >= 8, "what is larger than twice the smallest file that keeps it earns nothing"


def test_a_size_and_an_accuracy_together(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    limit = 0.2 * profile.predict(profile.default())
    study = study_of(tmp_path, profile, "frontier", max_size_bytes=limit, min_accuracy=0.9)
    drive(study, outcome)
    kept = [size for size, accuracy in values(study) if accuracy >= 0.9]
    assert min(kept) < 0.5 * limit, "the smallest that keeps the accuracy, however far below the size"
    assert sum(1 for size, _ in values(study)[12:] if size <= 2 * min(kept)) >= 8


def test_several_workers_do_not_ask_the_same_twice(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, "frontier", 40)
    rng = random.Random(0)
    running: list[TrialSpec] = []
    while len(study.trials()) < 40:
        while len(running) < 4 and (spec := study.ask()):
            running.append(spec)
        spec = running.pop(rng.randrange(len(running)))
        study.tell(spec.number, outcome(spec))
    asked = [tuple(sorted(t.params.items())) for t in study.trials() if t.user_attrs["move"] == "step"]
    assert len(set(asked)) >= 0.9 * len(asked)


def test_a_file_is_trained_on_by_one_worker_at_a_time(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, "frontier", 60)
    running: list[TrialSpec] = []
    trained_on = 0
    while len(study.trials()) < 60:
        while len(running) < 8 and (spec := study.ask()):
            running.append(spec)
        going = [study.get(spec.number).user_attrs for spec in running]
        parents = [told["parent"] for told in going if told["move"] == "train"]
        assert len(parents) == len(set(parents))
        trained_on += len(parents)
        spec = running.pop(0)
        study.tell(spec.number, outcome(spec))
    assert trained_on


def test_without_training_nothing_is_trained_on(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, "frontier", 60, trains=False)
    drive(study, outcome)
    assert {t.user_attrs["move"] for t in study.trials()} == {RACE, "step", "cross"}


def asked_by(workers: int, study: SearchStudy, outcome: Outcome, trials: int) -> list[FrozenTrial]:
    """So many trials of workers that are equally fast."""
    running: list[TrialSpec] = []
    while len(study.trials()) < trials:
        while len(running) < workers:
            spec = study.ask()
            assert spec
            running.append(spec)
        spec = running.pop(0)
        study.tell(spec.number, outcome(spec))
    return study.trials()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_steps_of_the_walk(workers: int, profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    trials = asked_by(workers, study_of(tmp_path, profile, "frontier", 40), outcome, 16)
    walk = [t.user_attrs["target_bytes"] for t in trials if t.user_attrs["move"] == "step"][:8]
    steps = [smaller / larger for larger, smaller in itertools.pairwise(walk)]
    assert max(steps) < 0.95, "no two of about the same size"
    assert min(steps) > 0.6


def test_many_workers_walk_less_and_do_not_all_take_the_same_step(
    profile: Profile, outcome: Outcome, tmp_path: Path
) -> None:
    steps = {}
    for workers in (2, 8):
        study = study_of(folder_of(tmp_path, str(workers)), profile, "frontier", 100)
        trials = [t.user_attrs for t in asked_by(workers, study, outcome, 100)]
        improving = [(t["move"], t["parent"], t["target_bytes"]) for t in trials if t["expected_accuracy"] is not None]
        steps[workers] = len(trials) - len(improving) - sum(t["move"] == RACE for t in trials)
        alike = sum(trial in improving[max(number + 1 - workers, 0) : number] for number, trial in enumerate(improving))
        assert not alike
    assert steps[8] < steps[2]


def test_failing_trials_do_not_stop_the_sampler(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, "frontier")
    while (spec := study.ask()) is not None:
        if spec.number % 3 == 0:
            study.fail(spec.number, "Traceback\nout of memory")
        else:
            study.tell(spec.number, outcome(spec))
    assert len(study.complete()) == 16


@pytest.mark.parametrize("bad", [("1:weights", "int4"), ("3:weights", "int2"), ("model:vectors", "e8m2")])
def test_a_choice_that_trials_fail_of_is_found_out(
    bad: tuple[str, str], profile: Profile, outcome: Outcome, tmp_path: Path
) -> None:
    areas, failed = [], list[dict[str, Any]]()
    for name, harm in (("sound", ("", "")), ("harmed", bad)):
        study = study_of(folder_of(tmp_path, name), profile, "frontier", 40)
        while (spec := study.ask()) is not None:
            params = study.get(spec.number).params
            if harm in params.items():
                study.fail(spec.number, "Traceback\nno such layer")
                failed.append(params)
            else:
                study.tell(spec.number, outcome(spec))
        areas.append(hypervolume(values(study), profile.predict(profile.default()), 0.5))
    assert 1 <= len(failed) <= 8
    assert all(one != other for one, other in itertools.combinations(failed, 2))
    assert areas[1] > 0.9 * areas[0]


def test_what_is_stopped_teaches_as_well(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    """All children of the first parent that is improved on are stopped halfway: others get theirs."""
    study, stopped, told, unlucky = study_of(tmp_path, profile, "frontier", 24), [], [], None
    while (spec := study.ask()) is not None:
        trial, result = study.get(spec.number), outcome(spec)
        improves = trial.user_attrs["expected_accuracy"] is not None
        unlucky = spec.parent if improves and unlucky is None else unlucky
        lost = 0.05 if improves and spec.parent == unlucky else 0.0
        study.rung(spec.number, Rung(1, 2, result.val_accuracy - 0.01 - lost))
        if lost:
            study.prune(spec.number)
            stopped.append(trial.params)
        else:
            study.tell(spec.number, result)
            told += [improves]
    assert 1 <= len(stopped) < 6 < sum(told)
    assert all(one != other for one, other in itertools.combinations(stopped, 2))


def test_unknown_samplers_are_named() -> None:
    with pytest.raises(SamplerError, match="did you mean 'frontier'"):
        check_sampler("fronteer")
