"""Whole searches: real files, and but for what needs none real Ray and real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import autocompress as ac
from autocompress.agent import preparation
from autocompress.agent.run_folder import create_run, existing_run
from autocompress.errors import RunError, TargetError
from tests import mini
from tests.conftest import small_digits, trials_run_here


@pytest.mark.usefixtures("without_ray")
def test_a_time_budget_ends_the_search_after_one_trial_at_least(tmp_path: Path) -> None:
    seen: list[ac.Progress] = []
    front = ac.search(mini.slow_task(), time_budget="1s", run=tmp_path / "run", workers=2, listener=seen.append)
    assert len(front) >= 1
    assert 1 <= seen[-1].done < 50
    assert seen[-1].budget < 50
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["time_budget_seconds"], config["paced"]) == (1, True)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("quiet", [False, True])
def test_a_search_shows_how_far_it_is(quiet: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ac.search(mini.task(), 2, run=tmp_path / "run", workers=1, quiet=quiet)
    told = capsys.readouterr()
    assert told.out == ""
    assert ("searching ..." in told.err, "2/2 trials" in told.err) == (not quiet, not quiet)
    assert bool(told.err) is not quiet


def test_the_front_is_made_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(preparation, "WORTH_WORKERS", 0)
    seen: list[ac.Progress] = []
    front = ac.search(mini.brief_task(), 8, run=tmp_path / "run", workers=2, listener=seen.append)
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
        measured = ac.evaluate(point.path, mini.brief_task())
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

    with trials_run_here():
        more = ac.resume(folder, task=mini.brief_task(), budget=10, workers=1)
    assert len(list((folder / "trials").iterdir())) == 10
    assert more.best().val_accuracy >= front.best().val_accuracy


def test_one_worker_and_one_seed_give_one_front_also_of_a_task_that_reads_files_of_the_current_folder(
    in_tmp: Path,
) -> None:
    torch.save(mini.task().build().state_dict(), "weights.pt")

    def written(name: str) -> dict[str, Any]:
        front = ac.search("tests.mini:task_from_a_file", 5, run=name, workers=1, seed=3).to_json()
        for point in front["front"]:
            del point["seconds"]
        return front

    elsewhere = written("a")
    with trials_run_here():
        assert written("b") == elsewhere


@pytest.mark.usefixtures("without_ray")
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
