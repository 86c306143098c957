"""The public names: each is there, as what it says, whatever was imported before it."""

from __future__ import annotations

import subprocess
import sys

import autocompress as ac


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
