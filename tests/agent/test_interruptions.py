"""Searches that fail, are killed or are asked to end; and how they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import autocompress as ac
from autocompress.agent import controller, engine
from autocompress.agent.results import Results
from autocompress.agent.run_folder import create_run
from autocompress.agent.sampler import FrontierSampler
from autocompress.errors import ArtifactError, RunError
from tests import mini
from tests.conftest import trials_run_here


@pytest.mark.usefixtures("without_ray")
def test_failing_trials_are_kept_on_record_and_the_search_goes_on(tmp_path: Path) -> None:
    front = ac.search("tests.mini:moody_task", 12, run=tmp_path / "run", workers=2)
    errors = {p.parent.name: p.read_text() for p in (tmp_path / "run").glob("trials/*/error.txt")}
    assert 0 < len(errors) < 12
    kinds = "".join(errors.values())
    assert "Traceback" in kinds
    assert "no room for this batch" in kinds or "the loss became nan" in kinds
    assert not {str(p.trial) for p in front} & set(errors)
    assert "failed: " in (tmp_path / "run" / "log").read_text()


def test_what_a_worker_dies_of_is_run_again_and_what_it_raises_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEADLY_MARK", str(tmp_path / "mark"))
    run = tmp_path / "run"
    front = ac.search("tests.mini:deadly_task", 5, run=run, workers=1)
    killed, raised = sorted(run.glob("trials/*/error.txt"))
    assert "killed" in killed.read_text()
    assert "MemoryError: no room for this batch" in raised.read_text()
    assert len(list(run.glob("trials/*/model.acz"))) == 4
    assert len(front) >= 1
    recipes = [(run / "trials" / number / "recipe.json").read_text() for number in ("0", "1", "2")]
    assert recipes[0] == recipes[1] != recipes[2]


@pytest.mark.usefixtures("without_ray")
def test_a_search_whose_trials_all_fail_ends_early_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "HOPELESS", 2)
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"the moon is in the wrong house.*--resume goes on"):
        ac.search("tests.mini:hopeless_task", 5, run=run, workers=1)
    assert len(list(run.glob("trials/*/error.txt"))) == 2
    front = ac.resume(run, task=mini.task(), workers=1)
    assert len(front) >= 1
    assert len(list(run.glob("trials/*/model.acz"))) == 3
    with pytest.raises(RunError, match="--resume with a larger --budget goes on"):
        ac.search("tests.mini:hopeless_task", 2, run=tmp_path / "spent", workers=1)


@pytest.mark.usefixtures("without_ray")
def test_what_the_sampler_raises_is_told_and_the_search_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        propose = FrontierSampler.propose

        def propose_two(self: FrontierSampler, done: Any, running: Any, number: int, rng: Any) -> Any:
            if number == 2:
                raise ZeroDivisionError("no third")
            return propose(self, done, running, number, rng)

        broken.setattr(FrontierSampler, "propose", propose_two)
        with pytest.raises(ZeroDivisionError, match="no third"):
            ac.search("tests.mini:task", 4, run=tmp_path / "run", workers=1)
    assert len(list((tmp_path / "run").glob("trials/*/model.acz"))) == 2
    assert len(ac.resume(tmp_path / "run")) >= 1
    assert len(list((tmp_path / "run").glob("trials/*/model.acz"))) == 4


@pytest.mark.usefixtures("without_ray")
def test_a_disk_that_is_full_ends_the_search_which_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        keep, kept = Results.keep, list[Results]()

        def keep_one(self: Results) -> None:
            if kept:
                raise ArtifactError("cannot write 'front.json': No space left on device")
            kept.append(self)
            keep(self)

        full.setattr(Results, "keep", keep_one)
        with pytest.raises(
            RunError, match=r"^cannot write .* left on device \(finished trials are kept: .*--resume goes on"
        ):
            ac.search("tests.mini:task", 4, run=tmp_path / "run", workers=1)
    assert len(list((tmp_path / "run").glob("trials/*/model.acz"))) == 2
    assert len(ac.resume(tmp_path / "run")) >= 1
    assert len(list((tmp_path / "run").glob("trials/*/model.acz"))) == 4


@pytest.mark.usefixtures("without_ray")
def test_a_run_folder_that_was_damaged_is_told_or_mended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    front = ac.search("tests.mini:task", 2, run=run, workers=1, quiet=True).to_json()
    for name in ("base.safetensors", "study.journal"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(b"\xff\n" * 20)
        with pytest.raises(RunError, match=rf"{name}' cannot be read: .* or start a new run"):
            ac.resume(run, quiet=True)
        (run / name).write_bytes(whole)
    whole = (run / "profile.json").read_bytes()
    (run / "profile.json").write_bytes(whole[:999])
    assert ac.resume(run, quiet=True).to_json() == front
    assert (run / "profile.json").read_bytes() == whole


def started(run: Path, trials: int, *options: str) -> subprocess.Popen[str]:
    """A search in a process group of its own, when so many of its 6 slow trials are finished."""
    command = [sys.executable, "-m", "autocompress", "search", "--quiet", "--workers", "1", *options]
    fresh = {name: value for name, value in os.environ.items() if name not in engine._SETTINGS}  # of searches before
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True, env=fresh)
    deadline = time.monotonic() + 120
    while len(list(run.glob("trials/*/metrics.json"))) < trials and process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return process


def test_a_search_that_is_asked_to_end_and_one_that_is_killed_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    asked = started(run, 1, "--task", "tests.mini:slow_task", "--budget", "6", "--run", str(run))
    asked.terminate()
    _, told = asked.communicate(timeout=60)
    said = f"stopped; finished trials are kept: go on by --resume {run}"
    assert (told.strip(), asked.returncode) == (said, 130)
    with pytest.raises(RunError, match="exists"):
        create_run(run, "mini")

    killed = started(run, 3, "--resume", str(run))
    assert killed.poll() is None, "the search ended too early"
    os.killpg(killed.pid, signal.SIGKILL)
    _, told = killed.communicate()
    assert told == ""
    before = {p: p.stat().st_mtime_ns for p in run.glob("trials/*/metrics.json")}
    assert 3 <= len(before) < 6

    with trials_run_here():
        front = ac.resume(run, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert 6 <= sum(1 for _ in run.glob("trials/*/metrics.json")) <= 8
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "finished trials are kept"
    assert len(front) >= 1
    assert front.to_json() == ac.ParetoFront.read(run).to_json()
