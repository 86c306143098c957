from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import RecipeError, SpaceError
from autocompress.model.anatomy import Anatomy, read_anatomy
from autocompress.recipe import Recipe
from autocompress.space import SearchSpace, space_files
from tests.conftest import zoo_task


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    task = zoo_task("residual")
    batch = next(task.batches("train"))
    return read_anatomy(task.build(), lambda model: task.run(model, batch)[0])


def test_packaged_spaces_bind(anatomy: Anatomy) -> None:
    assert {"default", "prune-only", "quantize-only"} <= set(space_files())
    for name in space_files():
        assert len(SearchSpace.named(name).bind(anatomy)) > 0


def test_default_space_holds_all_four_kinds(anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    names = {d.name for d in SearchSpace.named("default").bind(anatomy)}
    assert {"channels", "sparsity", "weights", "activation_bits", "activation", "precision"} <= names


def test_later_rules_replace_earlier_ones(anatomy: Anatomy) -> None:
    text = "layers: {'*': {weights: [int8, int4]}, 'head*': {weights: [float16]}}"
    bound = SearchSpace.parse(text).bind(anatomy)
    assert {d.choices for d in bound if d.site == "head"} == {("float16",)}
    assert {d.choices for d in bound if d.site == "conv1"} == {("int8", "int4")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [", r"space.yaml:1: not valid YAML"),
        ("layers:\n  '*':\n    weigths: [int4]", r"space.yaml:3: unknown dimension 'weigths'.*did you mean 'weights'"),
        ("layers:\n  '*':\n    weights: [int99]", r"space.yaml:3: layers.\*.weights: choice 'int99' does not exist"),
        ("layers:\n  '*':\n    sparsity: [1.5]", r"space.yaml:3: .*choice 1.5 does not exist"),
        ("layer: {}", r"space.yaml:1: unknown key 'layer'.*did you mean 'layers'"),
        ("layers: {'*': {weights: []}}", r"must list at least one"),
        ("description: nothing", r"nothing to search"),
        ("layers: {a: {weights: [int4]}, a: {weights: [int4]}}", r"'a' is given twice"),
        ("layers:\n  '*':\n    learning_rate: [1, 2]", r"space.yaml:3: learning_rate cannot .* name it under model"),
        ("model: {sparsity: [0, 0.5]}", r"space.yaml:1: sparsity cannot be chosen in model: name it under layers"),
    ],
)
def test_broken_yaml_names_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace.parse(text, "space.yaml")


def test_pattern_without_a_match_names_near_ones(anatomy: Anatomy) -> None:
    with pytest.raises(SpaceError, match=r"'conv9' matches no layer.*'conv1'"):
        SearchSpace.parse("layers: {conv9: {weights: [int4]}}").bind(anatomy)


def test_unknown_space_names_near_ones(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"unknown search space 'defualt'; did you mean 'default'"):
        SearchSpace.named("defualt")
    with pytest.raises(SpaceError, match="does not exist"):
        SearchSpace.named(tmp_path / "none.yaml")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_recipes_of_the_space_round_trip(anatomy: Anatomy, data: st.DataObject) -> None:
    bound = SearchSpace.named("default").bind(anatomy)
    chosen = {d.key: data.draw(st.sampled_from(d.choices)) for d in bound}
    recipe = bound.recipe(chosen)
    assert bound.complete(recipe) == chosen
    assert bound.complete(Recipe.from_json(recipe.to_json())) == chosen


def test_recipe_outside_the_space_is_refused(anatomy: Anatomy) -> None:
    bound = SearchSpace.named("quantize-only").bind(anatomy)
    with pytest.raises(RecipeError, match="offers"):
        bound.recipe({"head:weights": "int1"})
    with pytest.raises(RecipeError, match="did you mean 'head:weights'"):
        bound.recipe({"heat:weights": "int4"})


def test_a_choice_that_cannot_be_applied_where_it_is_asked_for_is_named(anatomy: Anatomy) -> None:
    asked = SearchSpace.parse("layers: {'conv*': {structure: [keep, drop]}}", name="mine")
    with pytest.raises(SpaceError, match=r"structure 'drop' cannot be applied to anything that matches 'conv\*'"):
        asked.bind(anatomy)
    everywhere = SearchSpace.parse("layers: {'*': {structure: [keep, drop, lowrank-0.25]}}").bind(anatomy)
    assert {d.choices for d in everywhere} == {("keep", "lowrank-0.25")}
    assert {"conv1", "conv2"} <= {d.site for d in everywhere}
