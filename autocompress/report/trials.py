"""The trials of a run, as its folder records them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from autocompress.errors import RecipeError, RunError, in_words
from autocompress.files import ERROR, METRICS, RECIPE
from autocompress.recipe import Recipe

_FEW = 3
"""Choices that are worth naming: more of them explain nothing."""


@dataclass(frozen=True)
class Trial:
    """A trial that was finished. parent: the trial that it was trained on or planned from; None: the original."""

    number: int
    size_bytes: int
    val_accuracy: float
    parent: int | None
    seconds: float


def read_trials(folder: Path) -> list[Trial]:
    """In the order of their numbers. Raises RunError for one that cannot be read."""
    trials = []
    for path in (folder / "trials").glob(f"*/{METRICS}"):
        try:
            told = json.loads(path.read_text())
            known = (told[name] for name in ("size_bytes", "val_accuracy", "parent", "seconds"))
            trials.append(Trial(int(path.parent.name), *known))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{str(path)!r} cannot be read: {in_words(error)}") from error
    return sorted(trials, key=lambda trial: trial.number)


def failure_sentences(folder: Path) -> list[str]:
    """What trials failed of, most of them first, and what they have in common that no finished trial has."""
    failed: dict[str, list[Path]] = {}
    for path in (folder / "trials").glob(f"*/{ERROR}"):
        if not (path.parent / METRICS).is_file():
            failed.setdefault(_reason(path.read_text(errors="replace")), []).append(path.parent)
    done = (folder / "trials").glob(f"*/{METRICS}") if failed else []
    finished = {choice for path in done for choice in _choices(path.parent)}
    sentences = []
    for reason, trials in sorted(failed.items(), key=lambda item: (-len(item[1]), item[0])):
        numbers = ", ".join(map(str, sorted(int(trial.name) for trial in trials)))
        told = f"trial {numbers} failed" if len(trials) == 1 else f"{len(trials)} trials failed ({numbers})"
        shared = sorted(set.intersection(*map(_choices, trials)) - finished)
        found = f"; no finished trial has {' or '.join(shared)}" if 0 < len(shared) <= _FEW else ""
        sentences.append(f"{told}: {reason}{found}")
    return sentences


def _reason(error: str) -> str:
    """The last line of a traceback, without the exception's module."""
    lines = error.strip().splitlines() or ["no reason was kept"]
    return re.sub(r"^(\w+\.)+(?=\w+(:|$))", "", lines[-1].strip())


def _choices(trial: Path) -> set[str]:
    """Those of its recipe, as "site:dimension = choice"; none where there is no recipe, or one that cannot be read."""
    try:
        recipe = Recipe.from_json(json.loads((trial / RECIPE).read_text()))
    except (OSError, ValueError, RecipeError):
        return set()
    return {f"{key} = {choice}" for key, choice in recipe.as_dict().items()}
