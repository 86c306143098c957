"""The folder of a run: where it is, what it holds, how it is named."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from autocompress.artifact import write_file
from autocompress.errors import RunError
from autocompress.space import SearchSpace
from autocompress.version import __version__

RUNS = Path("runs")
CONFIG, BASE, PROFILE, LOG = "config.yaml", "base.safetensors", "profile.json", "log"
REPORT = "report.html"


def run_path(name: str | Path) -> Path:
    """`runs/<name>` for a bare name, else the path itself."""
    path = Path(name)
    return path if len(path.parts) > 1 or path.is_absolute() else RUNS / path


def create_run(name: str | Path | None, task: str) -> Path:
    """A new, empty run folder. Raises RunError when it exists or cannot be written."""
    try:
        if name is not None:
            folder = run_path(name)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RunError(
                    f"run {str(folder)!r} exists: choose another name, or go on with it by --resume {folder}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", task).strip("-") or "run"
        for number in range(1, 100_000):
            folder = RUNS / f"{stem}-{number:04d}"
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise RunError(f"cannot create a run folder: {error.strerror}: {error.filename}") from error
    raise RunError("no free run name is left: give one with --run")


def existing_run(name: str | Path) -> Path:
    """The folder of an existing run, by name or path. Raises RunError when there is none."""
    for folder in (Path(name), run_path(name)):
        if (folder / CONFIG).is_file():
            return folder
    known = sorted(p.parent.name for p in RUNS.glob(f"*/{CONFIG}"))
    from autocompress.errors import near_misses

    raise RunError(f"there is no run {str(name)!r}{near_misses(str(name), known)}")


def write_config(folder: Path, space: SearchSpace, settings: Mapping[str, Any]) -> None:
    """All that is needed to repeat the run."""
    versions = {name: metadata.version(name) for name in ("torch", "optuna", "ray", "torch-pruning", "numpy")}
    rules = {pattern: {k: list(v) for k, v in rule.items()} for pattern, rule in space.rules}
    content = {
        **settings,
        "space": {
            "name": space.name,
            "description": space.description,
            "layers": rules,
            "model": {k: list(v) for k, v in space.training.items()},
        },
        "versions": {"autocompress": __version__, "python": platform.python_version(), **versions},
    }
    write_file(folder / CONFIG, yaml.safe_dump(content, sort_keys=False, width=100).encode())


def read_config(folder: Path) -> tuple[SearchSpace, dict[str, Any]]:
    """Inverse of `write_config`. Raises RunError when the file is broken."""
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text())
        space = content.pop("space")
        name, description = space.pop("name"), space.pop("description")
        text = yaml.safe_dump({k: v for k, v in space.items() if v}, sort_keys=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{str(path)!r} is not the config of a run: it lacks what a run needs ({error})") from error
    parsed = SearchSpace.parse(text, str(path), name)
    return SearchSpace(name, description, parsed.rules, parsed.training), content
