from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import RecipeError
from autocompress.recipe import Recipe

names = st.text("abc.:_0", min_size=1, max_size=6).filter(lambda s: not s.endswith(":"))
choices = st.one_of(st.sampled_from(["int4", "keep"]), st.integers(0, 9), st.floats(0, 1))


@given(st.dictionaries(st.tuples(names, st.sampled_from(["weights", "sparsity"])), choices))
def test_json_round_trip(chosen: dict[tuple[str, str], str | int | float]) -> None:
    recipe = Recipe.of({f"{site}:{name}": choice for (site, name), choice in chosen.items()})
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.digest == recipe.digest


def test_order_does_not_matter() -> None:
    a, b = {"a:weights": "int4"}, {"b:weights": "int3"}
    assert Recipe.of(a | b) == Recipe.of(b | a)


@pytest.mark.parametrize("data", [[], {"conv": 3}, {"conv": {"weights": None}}])
def test_other_forms_are_refused(data: object) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_json(data)
