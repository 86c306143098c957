"""The study is the truth: counted once, recovered after a crash, held by one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from autocompress.agent.profile import Profile
from autocompress.agent.samplers import make_sampler
from autocompress.agent.scheduler import is_dominated
from autocompress.agent.study import SearchStudy
from autocompress.errors import RunError
from autocompress.space import BoundSpace
from autocompress.trial.workshop import Rung, TrialResult
from tests.agent.conftest import BASE, Outcome, drive


def study_of(folder: Path, profile: Profile, budget: int = 8) -> SearchStudy:
    sampler = make_sampler("frontier", profile, budget, BASE, 0, None, None)
    return SearchStudy(folder, profile.space, budget, sampler)


def test_trials_of_a_dead_process_are_run_again(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    for _ in range(3):
        spec = study.ask()
        assert spec is not None
        study.tell(spec.number, outcome(spec))
    lost = study.ask()
    assert lost is not None
    study.close()

    study = study_of(tmp_path, profile)
    assert study.recover() == 1
    assert study.finished() == 3
    again = study.ask()
    assert again is not None
    assert (again.recipe, again.parent) == (lost.recipe, lost.parent)
    study.tell(again.number, outcome(again))
    drive(study, outcome)
    assert len(study.complete()) == 8
    assert study.get(again.number).user_attrs["predicted_bytes"] == study.get(lost.number).user_attrs["predicted_bytes"]


def test_a_trial_is_lost_with_its_worker_once_at_most(profile: Profile, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, budget=1)
    lost = study.ask()
    assert lost is not None
    assert study.lose(lost.number)
    assert not study.lose(lost.number)
    assert (study.finished(), study.remaining()) == (0, 1)
    again = study.ask()
    assert again is not None
    assert again.recipe == lost.recipe
    assert not study.lose(again.number)
    study.fail(again.number, "the worker died")
    assert (study.finished(), study.remaining()) == (1, 0)


def test_telling_twice_counts_once(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    spec = study.ask()
    assert spec is not None
    result = outcome(spec)
    study.tell(spec.number, result)
    study.tell(spec.number, TrialResult(1, 1.0, 1.0, 1.0))
    study.fail(spec.number, "late")
    study.prune(spec.number)
    assert study.finished() == 1
    assert study.complete()[0].values == [result.size_bytes, result.val_accuracy]


def test_the_budget_counts_what_runs_and_what_failed(profile: Profile, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, 3)
    specs = [study.ask() for _ in range(4)]
    assert specs[3] is None
    study.fail(0, "Traceback ...\nValueError: bad")
    study.prune(1)
    assert study.ask() is None
    assert study.get(0).user_attrs["error"].endswith("bad")
    assert [t.state for t in study.trials()] == [TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING]


def test_one_process_at_a_time(profile: Profile, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    with pytest.raises(RunError, match="in use by another process"):
        study_of(tmp_path, profile)
    study.close()
    study_of(tmp_path, profile).close()


def test_other_choices_than_those_of_the_run_are_refused(profile: Profile, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    study.ask()
    study.close()
    key = next(iter(profile.space)).key
    fewer = BoundSpace(tuple(replace(d, choices=d.choices[:-1]) if d.key == key else d for d in profile.space))
    for _ in range(2):
        with pytest.raises(RunError, match=f"was started where {key} had the choices .*: resume it on such a machine"):
            SearchStudy(tmp_path, fewer, 8)
    fewer = BoundSpace(tuple(d for d in profile.space if d.key != key))
    with pytest.raises(RunError, match=f"was started with the dimension {key}: resume it with its own model"):
        SearchStudy(tmp_path, fewer, 8)
    study_of(tmp_path, profile).close()


def test_clearly_dominated_at_the_rung(profile: Profile, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    study.rung(first.number, Rung(4, 8, 0.9))
    study.tell(first.number, TrialResult(100, 0.92, 100.0, 1.0))
    predicted = study.get(second.number).user_attrs["predicted_bytes"]
    assert predicted > 200
    assert is_dominated(study, second.number, Rung(4, 8, 0.7), 0.9)
    assert not is_dominated(study, second.number, Rung(4, 8, 0.89), 0.9)
    assert not is_dominated(study, second.number, Rung(3, 8, 0.7), 0.9), "only the same rung is compared"
    assert not is_dominated(study, second.number, Rung(4, 8, None), 0.9)


def test_a_trial_that_was_stopped_counts_as_far_as_it_came(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile, 4)
    for _ in range(2):
        spec = study.ask()
        assert spec is not None
        study.rung(spec.number, Rung(2, 4, 0.5))
        study.prune(spec.number)
    assert (study.finished(), study.spent(), study.remaining()) == (2, 1.0, 3)
    drive(study, outcome)
    assert len(study.trials()) == 5
