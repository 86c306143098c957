"""Imports point one way: from faces to the agent, trials, the artifact, techniques and nouns."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import autocompress

PACKAGE = Path(autocompress.__file__).parent
FACES = {"__init__", "__main__", "cli", "evaluation", "exporting", "report", "searching"}
FLOORS = ["techniques", "artifact", "trial", "agent"]
"""Above the nouns, to which all belong that are not named here."""


def floor(part: str) -> int:
    return len(FLOORS) + 1 if part in FACES else FLOORS.index(part) + 1 if part in FLOORS else 0


def imported(file: Path) -> set[str]:
    """Files and folders of the package that this file needs before anything of it can be used."""
    names = [node.module or "" for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[1] for name in names if name.startswith("autocompress.")}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_floor_and_those_below(file: Path) -> None:
    own = floor(file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    assert not {name for name in imported(file) if floor(name) > own}
