"""A recipe: one candidate of the joint search space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autocompress.errors import RecipeError

Choice = str | int | float
"""One option of a dimension: `"int4"`, `0.9`, `8`."""

MODEL = "model"
"""The site of dimensions that belong to the whole model or to its fine-tuning, not to a layer."""


@dataclass(frozen=True)
class Recipe:
    """An immutable choice per site and dimension; what is not named stays as it is in the model.

    `choices` maps `"<site>:<dimension>"` to a choice, sorted by key, so that equal recipes are equal
    objects. A site is the name of a layer or of an activation, or `MODEL`.
    """

    choices: tuple[tuple[str, Choice], ...] = ()

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Recipe:
        """From `{"conv1:weights": "int4", "model:precision": "float32"}`."""
        return cls(tuple(sorted(choices.items())))

    def get(self, site: str, dimension: str, default: Choice | None = None) -> Choice | None:
        return self.as_dict().get(f"{site}:{dimension}", default)

    def dimension(self, dimension: str) -> dict[str, Choice]:
        """Site -> choice for the sites that this recipe changes in `dimension`."""
        return {site: choice for site, name, choice in self if name == dimension}

    def only(self, dimensions: Container[str]) -> Recipe:
        """The part of this recipe that lies in `dimensions`."""
        return Recipe(tuple(pair for pair in self.choices if pair[0].rpartition(":")[2] in dimensions))

    def __iter__(self) -> Iterator[tuple[str, str, Choice]]:
        for key, choice in self.choices:
            site, _, dimension = key.rpartition(":")
            yield site, dimension, choice

    def as_dict(self) -> dict[str, Choice]:
        return dict(self.choices)

    def to_json(self) -> dict[str, dict[str, Choice]]:
        """`{"conv1": {"weights": "int4", "sparsity": 0.9}, "model": {"precision": "float32"}}`."""
        out: dict[str, dict[str, Choice]] = {}
        for site, dimension, choice in self:
            out.setdefault(site, {})[dimension] = choice
        return out

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Inverse of `to_json`; raises RecipeError when `data` has another form."""
        if not isinstance(data, dict):
            raise RecipeError("a recipe must be a mapping of layer -> {dimension: choice}")
        choices: dict[str, Choice] = {}
        for site, dimensions in data.items():
            if not isinstance(dimensions, dict):
                raise RecipeError(f"recipe entry {site!r} must be a mapping of dimension -> choice")
            for dimension, choice in dimensions.items():
                if not isinstance(choice, (str, int, float)):
                    raise RecipeError(f"recipe choice {site}:{dimension} must be a string or a number")
                choices[f"{site}:{dimension}"] = choice
        return cls.of(choices)

    @property
    def digest(self) -> str:
        """Twelve hex digits that name this recipe."""
        text = json.dumps(self.choices, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
