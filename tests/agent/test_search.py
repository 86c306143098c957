"""Whole searches: real Ray, real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import autocompress as ac
from autocompress.agent import controller
from autocompress.agent.run_folder import create_run, existing_run
from autocompress.agent.sampler import FrontierSampler
from autocompress.errors import RunError, TargetError
from tests import mini
from tests.conftest import small_digits


def test_a_time_budget_ends_the_search_after_one_trial_at_least(tmp_path: Path) -> None:
    seen: list[ac.Progress] = []
    front = ac.search(mini.slow_task(), time_budget="1s", run=tmp_path / "run", workers=2, listener=seen.append)
    assert len(front) >= 1
    assert 1 <= seen[-1].done < 50
    assert seen[-1].budget < 50
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["time_budget_seconds"], config["paced"]) == (1, True)


def test_the_front_is_made_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(controller, "WORTH_WORKERS", 0)
    seen: list[ac.Progress] = []
    front = ac.search(mini.task(), 8, run=tmp_path / "run", workers=2, listener=seen.append)
    folder = tmp_path / "run"
    written = json.loads((folder / "front.json").read_text())
    assert written == front.to_json()
    assert set(written) == {"task", "space", "seed", "base", "front"}
    assert written["base"]["size_bytes"] == (folder / "base.safetensors").stat().st_size
    assert len(front) >= 2
    sizes = [p.size_bytes for p in front]
    assert sizes == sorted(sizes)
    assert [p.val_accuracy for p in front] == sorted(p.val_accuracy for p in front)
    for point in front:
        assert point.path == folder / point.artifact
        assert point.size_bytes == point.path.stat().st_size
        measured = ac.evaluate(point.path, mini.task())
        assert (measured.size_bytes, measured.val_accuracy, measured.test_accuracy) == (
            point.size_bytes,
            point.val_accuracy,
            point.test_accuracy,
        )
        stored = ac.read_artifact(point.path).tensors
        for layer in "135":
            formats = (point.recipe.get(layer, {}).get("weights", "float32"), "constant")
            assert stored[f"{layer}.weight"].choice in formats
    assert {"front.png", "front.svg", "config.yaml", "log", "profile.json", "study.journal"} <= {
        p.name for p in folder.iterdir()
    }
    kept = {int(path.parent.name) for path in folder.glob("trials/*/checkpoint.safetensors")}
    assert kept == {point.trial for point in front}
    assert [p.phase for p in seen if "%" in p.phase] == [
        f"profiling every choice: {share}%" for share in (25, 50, 75, 100)
    ]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["budget"], config["seed"], config["space"]["name"]) == (8, 0, "default")
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[-1].phase, seen[-1].done, seen[-1].failed) == ("done", 8, 0)

    more = ac.resume(folder, task=mini.task(), budget=10, workers=1)
    assert len(list((folder / "trials").iterdir())) == 10
    assert more.best().val_accuracy >= front.best().val_accuracy


def test_one_worker_and_one_seed_give_one_front(tmp_path: Path) -> None:
    fronts = []
    for name in ("a", "b"):
        written = ac.search(mini.task(), 5, run=tmp_path / name, workers=1, seed=3).to_json()
        for point in written["front"]:
            del point["seconds"]
        fronts.append(written)
    assert fronts[0] == fronts[1]


def test_failing_trials_are_kept_on_record_and_the_search_goes_on(tmp_path: Path) -> None:
    front = ac.search("tests.mini:moody_task", 12, run=tmp_path / "run", workers=2)
    errors = {p.parent.name: p.read_text() for p in (tmp_path / "run").glob("trials/*/error.txt")}
    assert 0 < len(errors) < 12
    kinds = "".join(errors.values())
    assert "Traceback" in kinds
    assert "no room for this batch" in kinds or "the loss became nan" in kinds
    assert not {str(p.trial) for p in front} & set(errors)
    assert "failed: " in (tmp_path / "run" / "log").read_text()


def test_the_trial_of_a_killed_worker_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADLY_MARK", str(tmp_path / "mark"))
    front = ac.search("tests.mini:deadly_task", 5, run=tmp_path / "run", workers=1)
    errors = list((tmp_path / "run").glob("trials/*/error.txt"))
    assert len(errors) == 1
    assert "killed" in errors[0].read_text()
    assert len(list((tmp_path / "run").glob("trials/*/model.acz"))) == 5
    assert len(front) >= 1
    recipes = [(tmp_path / "run" / "trials" / number / "recipe.json").read_text() for number in ("0", "1")]
    assert recipes[0] == recipes[1]


def test_when_every_trial_fails_the_last_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the moon is in the wrong house"):
        ac.search("tests.mini:hopeless_task", 2, run=tmp_path / "run", workers=1)
    assert len(list((tmp_path / "run").glob("trials/*/error.txt"))) == 2


def test_a_search_whose_trials_all_fail_ends_early_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "HOPELESS", 2)
    run = tmp_path / "run"
    with pytest.raises(RunError, match="--resume goes on"):
        ac.search("tests.mini:hopeless_task", 5, run=run, workers=1)
    assert len(list(run.glob("trials/*/error.txt"))) == 2
    front = ac.resume(run, task=mini.task(), workers=1)
    assert len(front) >= 1
    assert len(list(run.glob("trials/*/model.acz"))) == 3


def test_a_task_may_read_files_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(mini.task().build().state_dict(), "weights.pt")
    assert len(ac.search("tests.mini:task_from_a_file", 2, run="run", workers=1)) >= 1


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


COMMAND = [sys.executable, "-m", "autocompress", "search", "--quiet", "--workers", "1"]


def started(run: Path, trials: int) -> subprocess.Popen[str]:
    """A slow search in a process group of its own, when so many of its 6 trials are finished."""
    command = [*COMMAND, "--task", "tests.mini:slow_task", "--budget", "6", "--run", str(run)]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background may be deaf to it
    )
    deadline = time.monotonic() + 120
    while len(list(run.glob("trials/*/metrics.json"))) < trials and process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_asked_to_end_says_how_to_go_on(tmp_path: Path, asked: signal.Signals) -> None:
    run = tmp_path / "run"
    process = started(run, trials=1)
    process.send_signal(asked)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.strip() == f"stopped; finished trials are kept: go on by --resume {run}"


def test_a_killed_search_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, trials=2)
    assert process.poll() is None, "the search ended too early"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in run.glob("trials/*/metrics.json")}
    assert len(before) < 6
    with pytest.raises(RunError, match="exists"):
        create_run(run, "mini")
    done = subprocess.run([*COMMAND, "--resume", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run)
    assert done.stderr == ""
    complete = sum(1 for _ in run.glob("trials/*/metrics.json"))
    assert 6 <= complete <= 7
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "finished trials are kept"
    assert len(ac.ParetoFront.read(run)) >= 1


def test_impossible_wishes_are_refused_before_any_trial(tmp_path: Path) -> None:
    for wish, message in (
        ({"max_size": "10B"}, "the smallest is about"),
        ({"min_accuracy": 1.5}, "minimum accuracy 1.5 cannot be reached"),
        ({"budget": 0}, "give at least 1 trial"),
        ({"workers": 0}, "give at least 1"),
        ({"sampler": "tpee"}, "did you mean 'tpe'"),
        ({"space": "defalt"}, "did you mean 'default'"),
    ):
        with pytest.raises(ac.AutocompressError, match=message):
            ac.search(small_digits(), run=tmp_path / "run", **wish)
        assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_unknown_runs_are_named(in_tmp: Path) -> None:
    (in_tmp / "runs" / "digits-0001").mkdir(parents=True)
    (in_tmp / "runs" / "digits-0001" / "config.yaml").write_text("{}")
    with pytest.raises(RunError, match="did you mean 'digits-0001'"):
        existing_run("digits-001")
    assert create_run(None, "digits").name == "digits-0002"
    with pytest.raises(TargetError):
        ac.resume("digits-0001", budget=0)
