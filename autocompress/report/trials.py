"""The trials of a run, as its folder records them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from autocompress.errors import RunError, in_words
from autocompress.trial import METRICS


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
