"""The profile predicts bytes, the planner finds cheap distortion."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.agent.planner import plan
from autocompress.agent.profile import Profile
from autocompress.files import ARTIFACT
from autocompress.searching import profile as profile_of
from autocompress.space import BoundSpace, SearchSpace
from autocompress.trial.workshop import TrialResult, TrialSpec, Workshop
from benchmarks.proposals import made_up
from tests.conftest import small_digits, workshop_of, zoo_task


def test_predicted_bytes_are_near_the_file_before_training(profile: Profile, tmp_path: Path) -> None:
    task = small_digits(epochs=0)
    probe = Workshop(task, task.build(), BoundSpace(()), tmp_path, 0)
    workshop = Workshop(task, task.build(), profile.space, tmp_path, 0)
    assert probe.anatomy.layers == workshop.anatomy.layers
    for number, wanted in enumerate((0.6, 0.3, 0.1)):
        target = wanted * profile.predict(profile.default())
        allowed = {d.key: d.choices for d in profile.space}
        chosen = plan(profile, profile.effect_table, target, profile.default(), allowed)
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
    chosen = plan(profile, profile.effect_table, target, profile.default(), allowed)
    assert profile.predict(chosen) <= target * 1.0001
    assert all(chosen[d.key] in d.choices for d in profile.space)


def test_what_is_not_allowed_stays(profile: Profile) -> None:
    only = next(d for d in profile.space if d.name == "weights")
    chosen = plan(profile, profile.effect_table, 1.0, profile.default(), {only.key: only.choices})
    assert {k for k, v in chosen.items() if v != profile.default()[k]} == {only.key}


@pytest.mark.parametrize("choices", ["sparsity: [0, 0.5, 0.9]", "weights: [float32, int8, int4, int2]"])
def test_one_dimension_is_a_space(choices: str) -> None:
    task = small_digits()
    space = SearchSpace.parse(f"{{layers: {{'*': {{{choices}}}}}}}")
    narrow = profile_of(task, space)
    chosen = plan(narrow, narrow.effect_table, 1.0, narrow.default(), {d.key: d.choices for d in narrow.space})
    assert all(chosen[d.key] == d.choices[-1] for d in narrow.space)
    assert narrow.predict(chosen) == pytest.approx(narrow.smallest_bytes())


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
        chosen = plan(profile, profile.effect_table, target, start, {d.key: d.choices for d in dims})
        assert profile.predict(chosen) <= target * 1.0001
        assert effect(chosen) <= 1.2 * best + 1e-4


def test_a_file_is_not_filled_up_with_bits_that_do_no_good(profile: Profile) -> None:
    """Whatever room is left below the target: what hardly feels its bit width has the smallest."""
    free = next(d for d in profile.space if d.name == "weights")
    effects = profile.effect_table.copy()
    effects[profile.at[free.key]] = 1e-11 * np.arange(effects.shape[1])
    allowed = {d.key: d.choices for d in profile.space if d.name in ("weights", "sparsity")}
    for share in np.linspace(0.05, 0.28, 13):
        chosen = plan(profile, effects, share * profile.predict(profile.default()), profile.default(), allowed)
        assert chosen[free.key] == free.choices[-1]


def test_vectors_as_they_are_change_nothing_and_fewer_bits_change_more() -> None:
    """Also where norms are folded in the file and the distance is measured on the statistics of the batch."""
    task = zoo_task("residual")
    space = SearchSpace.parse("model: {vectors: [float32, float16, e8m5, e8m2]}")
    effects = list(profile_of(task, space).effects["model:vectors"].values())
    assert effects[0] == pytest.approx(0, abs=1e-6)
    assert effects[1] < 1e-6
    assert effects[1] < effects[2] < effects[3]


def test_a_distance_is_never_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of float32 may round a divergence of nothing to -1e-9, and its root is taken for the learning rate."""
    task = small_digits()
    workshop = workshop_of(task)
    prober = workshop.prober
    monkeypatch.setattr("autocompress.trial.probing.divergence", lambda *given: torch.tensor(-1e-9))
    assert prober.distance(workshop.original) == 0


def test_a_large_plan_is_near_the_bound_of_its_relaxation() -> None:
    """Weak duality: for any price, no recipe within the target has less effect than the cheapest recipe's
    effect + price x (bytes - target). Without shared groups that one is picked exactly."""
    profile = made_up(200, 10, 10)
    allowed = {d.key: d.choices for d in profile.space}
    free = {key: choices for key, choices in allowed.items() if not key.endswith("channels")}
    whole = profile.predict(profile.default())
    for share in (0.5, 0.2, 0.08):
        chosen = plan(profile, profile.effect_table, share * whole, profile.default(), free)
        assert profile.predict(chosen) <= share * whole
        effect = sum(profile.effects[key][str(chosen[key])] for key in free)
        bound = 0.0
        for price in np.logspace(-8, 0, 400):
            total = -price * (share * whole - profile.header_bytes - 40)
            for i in range(200):
                e = np.add.outer(
                    *(np.array(list(profile.effects[f"l{i}:{n}"].values())) for n in ("sparsity", "weights"))
                )
                total += float((e.ravel() + price * profile.table[i]).min())
            bound = max(bound, total)
        assert effect <= 1.02 * bound


def test_groups_of_channels_are_used_where_they_pay() -> None:
    profile = made_up(40, 4, 4)
    allowed = {d.key: d.choices for d in profile.space}
    target = 0.3 * profile.predict(profile.default())
    effect = {}
    for name, keys in (("without", [k for k in allowed if "channels" not in k]), ("with", list(allowed))):
        chosen = plan(profile, profile.effect_table, target, profile.default(), {k: allowed[k] for k in keys})
        assert profile.predict(chosen) <= target
        effect[name] = sum(profile.effects[key][str(choice)] for key, choice in chosen.items())
    assert effect["with"] < 0.95 * effect["without"]
