"""The joint search space: YAML patterns over layers -> choices, bound to the parts of one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import yaml

from autocompress.errors import RecipeError, SpaceError, near_misses
from autocompress.model.anatomy import Anatomy
from autocompress.recipe import MODEL, Choice, Recipe

_HERE = Path(__file__).parent
FOLDERS = (_HERE / "search_spaces", _HERE.parent / "search_spaces")
"""Where spaces are found by name: inside an installed wheel, or beside the package in a checkout."""


class Dimension(Protocol):
    """What a dimension of the space must provide; techniques do (see `techniques/base.py`)."""

    @property
    def name(self) -> str: ...

    @property
    def default(self) -> Choice: ...

    @property
    def voiding(self) -> bool:
        """Whether `voids` is ever true."""

    @property
    def sections(self) -> tuple[str, ...]:
        """Where a space can name it: `layers`, `model`."""

    @property
    def about(self) -> str:
        """One line for people."""

    def parse(self, raw: Any) -> Choice:
        """The choice meant by a YAML value; raises SpaceError with what is offered."""

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        """Where in this model the dimension exists; `[MODEL]` for those of the whole model."""

    def available(self, choice: Choice) -> bool:
        """Whether this machine can do it."""

    def pays(self, choice: Choice) -> bool:
        """Whether this machine gains anything by it, where others are offered."""

    def fits(self, choice: Choice, site: str, anatomy: Anatomy) -> bool:
        """Whether this part of the model can have it."""

    def voids(self, choice: Choice, site: str, dimension: str, other: str) -> bool:
        """Whether `choice` at `site` leaves nothing to choose in `dimension` at `other`."""


_DIMENSIONS: dict[str, Dimension] = {}


def register_dimension(dimension: Dimension) -> None:
    _DIMENSIONS[dimension.name] = dimension


def dimensions() -> Mapping[str, Dimension]:
    """All dimensions by name, in the order in which they are applied."""
    return _DIMENSIONS


def without_void(chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """`chosen` (key -> choice) without what other choices leave no room for: a dropped layer has none."""
    voiding: list[tuple[str, str, Choice]] = []

    def void(key: str) -> bool:
        site, _, name = key.rpartition(":")
        return any(_DIMENSIONS[by].voids(choice, at, name, site) for at, by, choice in voiding)

    able = [key for key in chosen if _DIMENSIONS[key.rpartition(":")[2]].voiding]
    for key in sorted(able, key=lambda key: (not key.startswith(f"{MODEL}:"), len(key))):  # from the outside in
        if not void(key):
            voiding.append((*key.rpartition(":")[::2], chosen[key]))
    return {key: choice for key, choice in chosen.items() if not void(key)}


@dataclass(frozen=True)
class BoundDimension:
    """One axis of the joint space. `choices` run from the lightest compression to the heaviest."""

    site: str
    name: str
    choices: tuple[Choice, ...]
    default: Choice

    @property
    def key(self) -> str:
        return f"{self.site}:{self.name}"


@dataclass(frozen=True)
class BoundSpace:
    """The finite joint space of one model: the product of its dimensions' choices."""

    dimensions: tuple[BoundDimension, ...]

    def __iter__(self) -> Iterator[BoundDimension]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def log10_size(self) -> float:
        """log10 of the number of recipes."""
        return sum(math.log10(len(dimension.choices)) for dimension in self.dimensions)

    def recipe(self, chosen: Mapping[str, Choice]) -> Recipe:
        """The recipe with `chosen` (key -> choice); choices that change nothing are left out, void ones too.

        Raises RecipeError for a key or a choice that is not in the space.
        """
        known = {dimension.key: dimension for dimension in self.dimensions}
        kept = {}
        for key, choice in chosen.items():
            if key not in known:
                raise RecipeError(f"the space has no dimension {key!r}{near_misses(key, known)}")
            if choice not in known[key].choices:
                offered = ", ".join(map(str, known[key].choices))
                raise RecipeError(f"{key} offers {offered}, not {choice!r}")
            if choice != known[key].default:
                kept[key] = choice
        return Recipe.of(without_void(kept))

    def complete(self, recipe: Recipe) -> dict[str, Choice]:
        """key -> choice for every dimension, filling in what the recipe leaves as it is."""
        chosen = recipe.as_dict()
        return {d.key: chosen.get(d.key, d.default) for d in self.dimensions}


@dataclass(frozen=True)
class SearchSpace:
    """Rules read from YAML, in order; a later rule replaces the choices of the dimensions it names.

    rules: (pattern over site names, dimension -> choices). training: dimension -> choices for `MODEL`.
    """

    name: str
    description: str = ""
    rules: tuple[tuple[str, Mapping[str, tuple[Choice, ...]]], ...] = ()
    training: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str | Path) -> SearchSpace:
        """A packaged space by name, or any YAML file by path.

        Raises SpaceError with the near misses, or with file, line and key of what is wrong.
        """
        path = Path(name)
        if path.suffix in (".yaml", ".yml") or path.is_file():
            if not path.is_file():
                raise SpaceError(f"search space file {str(name)!r} does not exist")
            try:
                text = path.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise SpaceError(f"search space file {str(name)!r} cannot be read: {error}") from error
            return cls.parse(text, str(path), path.stem)
        files = space_files()
        if str(name) not in files:
            raise SpaceError(
                f"unknown search space {str(name)!r}{near_misses(str(name), files)} (or give a .yaml file)"
            )
        file = files[str(name)]
        return cls.parse(file.read_text(), file.name, file.stem)

    @classmethod
    def parse(cls, text: str, where: str = "search space", name: str = "custom") -> SearchSpace:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise SpaceError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
        return _Reader(where).space(root, name)

    def bind(self, anatomy: Anatomy) -> BoundSpace:
        """The joint space of one model. Raises SpaceError for a pattern that matches nothing, and for a choice that
        cannot be applied to anything that its pattern matches; under `*` such choices are left out."""
        self._check(anatomy)
        bound = []
        for name, dimension in _DIMENSIONS.items():
            for site in dimension.sites(anatomy):
                asked = self._asked(site, name)
                choices = tuple(c for c in asked if dimension.available(c) and dimension.fits(c, site, anatomy))
                choices = tuple(c for c in choices if dimension.pays(c)) or choices
                if choices and choices != (dimension.default,):
                    bound.append(BoundDimension(site, name, choices, dimension.default))
        if not bound:
            raise SpaceError(f"space {self.name!r} offers nothing for this model: it has no layer that it can compress")
        return BoundSpace(tuple(bound))

    def _asked(self, site: str, name: str) -> tuple[Choice, ...]:
        """The choices of one dimension at one site: those of the last rule that has some."""
        if site == MODEL:
            return self.training.get(name, ())
        found = [named[name] for pattern, named in self.rules if name in named and fnmatchcase(site, pattern)]
        return found[-1] if found else ()

    def _check(self, anatomy: Anatomy) -> None:
        """Raises SpaceError for a rule that does nothing, unless it is for all."""
        sites_of = {name: [s for s in d.sites(anatomy) if s != MODEL] for name, d in _DIMENSIONS.items()}
        everything = {site for sites in sites_of.values() for site in sites}
        rules = [(pattern, *rule) for pattern, named in self.rules for rule in named.items() if pattern != "*"]
        for pattern, name, choices in rules:
            matching = [site for site in sites_of[name] if fnmatchcase(site, pattern)]
            if not matching:
                raise SpaceError(
                    f"space {self.name!r}: pattern {pattern!r} matches no layer with dimension {name!r}"
                    f"{near_misses(pattern, sites_of[name] or everything)}"
                )
            for choice in choices:
                if not any(_DIMENSIONS[name].fits(choice, site, anatomy) for site in matching):
                    raise SpaceError(
                        f"space {self.name!r}: {name} {choice!r} cannot be applied to anything that matches "
                        f"{pattern!r}; 'autocompress techniques' lists what it is not for"
                    )


def space_files() -> dict[str, Path]:
    """Packaged spaces: name -> file."""
    return {file.stem: file for folder in reversed(FOLDERS) for file in sorted(folder.glob("*.yaml"))}


class _Reader:
    """Reads the YAML node tree, so that every complaint can name the file, the line and the key."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, node: Any, message: str) -> SpaceError:
        return SpaceError(f"{self.where}:{node.start_mark.line + 1}: {message}" if node else f"{self.where}: {message}")

    def mapping(self, node: Any, key: str) -> list[tuple[str, Any, Any]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{key} must be a mapping")
        pairs = [(str(k.value), k, v) for k, v in node.value]
        for i, (name, at, _) in enumerate(pairs):
            if name in {other for other, _, _ in pairs[:i]}:
                raise self.fail(at, f"key {name!r} is given twice")
        return pairs

    def space(self, root: Any, name: str) -> SearchSpace:
        description, rules, training = "", [], {}
        for key, at, node in self.mapping(root, "a search space"):
            if key == "description":
                description = " ".join(str(node.value).split())
            elif key == "layers":
                for pattern, _, rule in self.mapping(node, "layers"):
                    rules.append((pattern, self.choices(rule, f"layers.{pattern}")))
            elif key == "model":
                training = self.choices(node, "model")
            else:
                raise self.fail(at, f"unknown key {key!r}{near_misses(key, ['description', 'layers', 'model'])}")
        if not rules and not training:
            raise self.fail(root, "nothing to search: give 'layers' with patterns and choices")
        return SearchSpace(name, description, tuple(rules), training)

    def choices(self, node: Any, key: str) -> dict[str, tuple[Choice, ...]]:
        out = {}
        for name, at, listed in self.mapping(node, key):
            if name not in _DIMENSIONS:
                raise self.fail(at, f"unknown dimension {name!r} in {key}{near_misses(name, _DIMENSIONS)}")
            sections = _DIMENSIONS[name].sections
            if key.split(".")[0] not in sections:
                raise self.fail(at, f"{name} cannot be chosen in {key}: name it under {' or '.join(sections)}")
            values = yaml.SafeLoader("").construct_object(listed, deep=True)
            parsed = []
            for value in values if isinstance(values, list) else [values]:
                try:
                    parsed.append(_DIMENSIONS[name].parse(value))
                except SpaceError as error:
                    raise self.fail(listed, f"{key}.{name}: {error}") from error
            if not parsed:
                raise self.fail(listed, f"{key}.{name} must list at least one choice")
            out[name] = tuple(dict.fromkeys(parsed))
        return out
