"""The folder of a run: where it is, what it holds, how it is named."""

from __future__ import annotations

import re
from pathlib import Path

from autocompress.errors import RunError, near_misses

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
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(task).name.replace(".py", "")).strip("-") or "run"
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
    raise RunError(f"there is no run {str(name)!r}{near_misses(str(name), known)}")
