"""The profile predicts bytes, the planner finds cheap distortion."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from conftest import small_digits
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.search.planner import plan
from autocompress.search.profile import Profile
from autocompress.space import BoundSpace
from autocompress.trial import ARTIFACT, TrialResult, TrialSpec, Workshop


def test_predicted_bytes_are_near_the_file_before_training(profile: Profile, tmp_path: Path) -> None:
    task = small_digits(epochs=0)
    probe = Workshop(task, task.build(), BoundSpace(()), tmp_path, 0)
    workshop = Workshop(task, task.build(), profile.space, tmp_path, 0)
    assert probe.anatomy.layers == workshop.anatomy.layers
    for number, wanted in enumerate((0.6, 0.3, 0.1)):
        target = wanted * profile.predict(profile.default())
        allowed = {d.key: d.choices for d in profile.space}
        chosen = plan(profile, profile.effects, target, profile.default(), allowed)
        recipe = profile.space.recipe(chosen)
        *_, result = workshop.run(TrialSpec(number, recipe.to_json()))
        assert isinstance(result, TrialResult)
        assert (tmp_path / "trials" / str(number) / ARTIFACT).stat().st_size == result.size_bytes
        assert profile.predict(chosen) == pytest.approx(result.size_bytes, rel=0.15)


def test_every_heavier_choice_of_bytes_is_predicted_smaller(profile: Profile) -> None:
    start = profile.default()
    for d in profile.space:
        if d.name in ("channels", "sparsity", "weights"):
            sizes = [profile.predict({**start, d.key: choice}) for choice in d.choices]
            assert sizes == sorted(sizes, reverse=True), d.key


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.9))
def test_the_plan_meets_its_target(profile: Profile, share: float) -> None:
    allowed = {d.key: d.choices for d in profile.space}
    target = max(share * profile.predict(profile.default()), profile.smallest_bytes() * 1.01)
    chosen = plan(profile, profile.effects, target, profile.default(), allowed)
    assert profile.predict(chosen) <= target * 1.0001
    assert all(chosen[d.key] in d.choices for d in profile.space)


def test_what_is_not_allowed_stays(profile: Profile) -> None:
    only = next(d for d in profile.space if d.name == "weights")
    chosen = plan(profile, profile.effects, 1.0, profile.default(), {only.key: only.choices})
    assert {k for k, v in chosen.items() if v != profile.default()[k]} == {only.key}


def test_the_plan_is_near_the_best_of_all_recipes(profile: Profile) -> None:
    """Independent reference: brute force over two layers' bit widths and sparsities."""
    dims = [d for d in profile.space if d.name in ("weights", "sparsity")][:3]
    start = profile.default()
    every = [
        {**start, **dict(zip((d.key for d in dims), c, strict=True))}
        for c in itertools.product(*(d.choices for d in dims))
    ]

    def effect(chosen: dict[str, object]) -> float:
        return sum(profile.effects[d.key][str(chosen[d.key])] for d in dims)

    sizes = sorted(profile.predict(c) for c in every)
    for target in sizes[len(sizes) // 4 :: len(sizes) // 4]:
        best = min(effect(c) for c in every if profile.predict(c) <= target)
        chosen = plan(profile, profile.effects, target, start, {d.key: d.choices for d in dims})
        assert profile.predict(chosen) <= target * 1.0001
        assert effect(chosen) <= 2.5 * best + 1e-3
