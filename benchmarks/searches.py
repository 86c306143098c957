"""Searches that a benchmark needs: made once, taken up again where they were stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import autocompress as ac


def front_of(folder: Path, task: str, budget: int, **settings: Any) -> ac.ParetoFront:
    """The front of the finished search in `folder`, made now when it is not there yet. settings: of `ac.search`."""
    if (folder / "front.png").is_file():
        return ac.ParetoFront.read(folder)
    if (folder / "config.yaml").is_file():
        return ac.resume(folder)
    return ac.search(task, budget, run=folder, **settings)
