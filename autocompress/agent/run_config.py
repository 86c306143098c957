"""What a run was asked for, in full, as a file."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from autocompress.agent.run_folder import CONFIG
from autocompress.errors import RunError
from autocompress.files import write_file
from autocompress.space import SearchSpace
from autocompress.version import __version__


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
