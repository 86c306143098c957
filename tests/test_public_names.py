"""The public names: each is there, as what it says, whatever was imported before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import autocompress as ac
from autocompress.report.api import markdown


def test_every_public_name_is_there() -> None:
    assert {"search", "resume", "evaluate", "export", "load", "Task", "FrontierSampler"} <= set(ac.__all__)
    assert set(ac.__all__) <= set(dir(ac))
    for name in ac.__all__:
        assert getattr(ac, name) is not None
    for name in ("search", "resume", "profile", "evaluate", "export", "load", "read_artifact"):
        assert callable(getattr(ac, name)), f"{name} is a function, not a module"


def test_no_module_hides_a_name() -> None:
    code = "import autocompress.cli, autocompress.agent.controller, autocompress.evaluation, autocompress as ac; "
    code += "assert callable(ac.search) and callable(ac.evaluate) and callable(ac.export)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_api_is_what_the_docstrings_hold() -> None:
    assert (Path(__file__).parents[1] / "docs" / "api.md").read_text() == markdown()
    assert all(f"## {name}\n" in markdown() for name in ac.__all__ if name not in ("__version__", "techniques"))
