"""Ray as we start it: silent, private, on loopback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cloudpickle
import pytest
import ray
import torch
from ray.tune.utils.object_cache import _ObjectCache

from autocompress.agent.engine import run_trials, start_ray
from autocompress.agent.tuning import Rungs
from autocompress.errors import RunError
from autocompress.trial.workshop import TrialResult, TrialSpec


def listening_elsewhere() -> set[str]:
    """Local addresses (hex, as in /proc/net/tcp) of sockets that listen on more than loopback."""
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    return {row[1] for row in rows if row[3] == "0A" and not row[1].startswith(loopback)}


def waiting() -> set[int]:
    """Processes of Ray workers of this process that have nothing to do."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            title = (status.parent / "cmdline").read_bytes()
            if title.startswith(b"ray::IDLE") and parent_of(parent_of(int(status.parent.name))) == os.getpid():
                found.add(int(status.parent.name))
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_workers_are_kept_for_trials_to_come() -> None:
    controller, trial = SimpleNamespace(_actor_cache=_ObjectCache()), SimpleNamespace(placement_group_factory="a core")
    rungs = Rungs(mock.Mock(), {}, workers=3)
    for _ in range(5):
        rungs.on_trial_add(controller, trial)
    assert [controller._actor_cache.cache_object("a core", worker) for worker in range(4)] == [True] * 3 + [False]


class Instant:
    """A workshop whose trials take no time. The first is ready at once, every other one after two seconds."""

    def __init__(self, folder: Path) -> None:
        if any(folder.iterdir()):
            time.sleep(2)
        (folder / str(os.getpid())).touch()

    def run(self, spec: TrialSpec) -> Iterator[TrialResult]:
        time.sleep(0.05)
        yield TrialResult(os.getpid(), float("torch._dynamo" in sys.modules), 0.0, 0.05)


class Endless:
    """Supplies trials until two workers have run some, or twenty seconds are over."""

    def __init__(self) -> None:
        self.asked, self.processes, self.began = 0, dict[int, float](), time.monotonic()

    def next(self) -> TrialSpec | None:
        self.asked += 1
        over = len(self.processes) > 1 or time.monotonic() > self.began + 20
        return None if over else TrialSpec(self.asked, {})

    def finished(self, number: int, result: TrialResult) -> None:
        if not self.processes:
            self.began = time.monotonic()
        self.processes[result.size_bytes] = result.val_accuracy


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux only")
def test_ray_is_private_and_silent_and_processes_that_wait_run_trials(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also trials that are shorter than the start of a worker are run by all of them."""
    before = listening_elsewhere()
    (tmp_path / "ready").mkdir()
    connection, supply = start_ray(2), Endless()
    try:
        with pytest.raises(RunError, match="another search of this process is running"):
            start_ray(1)
        deadline = time.monotonic() + 60
        while len(waiting()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        there = waiting()
        run_trials(cloudpickle.dumps(lambda: Instant(tmp_path / "ready")), supply, 10_000, 2, 0.0, tmp_path)
        assert ray.get(ray.remote(lambda: 41 + 1).remote()) == 42
        assert listening_elsewhere() <= before
    finally:
        connection.close()
    assert connection.folder
    assert not connection.folder.exists()
    assert capfd.readouterr() == ("", "")
    assert len(there) == 2
    assert len(supply.processes) == 2
    assert not there.isdisjoint(supply.processes)  # under load one may still be starting, and Ray starts another
    assert all(supply.processes.values()) or torch.cuda.is_available(), "they have imported what trials need"
