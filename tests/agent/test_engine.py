"""Ray as we start it: silent, private, on loopback."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cloudpickle
import pytest
from ray.tune.utils.object_cache import _ObjectCache

from autocompress.agent.engine import run_trials, start_ray
from autocompress.agent.tuning import Rungs
from autocompress.errors import RunError
from autocompress.trial import TrialResult, TrialSpec


def listening_elsewhere() -> set[str]:
    """Local addresses (hex, as in /proc/net/tcp) of sockets that listen on more than loopback."""
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    return {row[1] for row in rows if row[3] == "0A" and not row[1].startswith(loopback)}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux only")
def test_nothing_listens_beyond_loopback(capfd: pytest.CaptureFixture[str]) -> None:
    import ray

    before = listening_elsewhere()
    connection = start_ray(1)
    try:
        with pytest.raises(RunError, match="another search of this process is running"):
            start_ray(1)
        assert ray.get(ray.remote(lambda: 41 + 1).remote()) == 42
        assert listening_elsewhere() <= before
    finally:
        connection.close()
    assert connection.folder
    assert not connection.folder.exists()
    assert capfd.readouterr() == ("", "")


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
        yield TrialResult(os.getpid(), 0.0, 0.0, 0.05)


class Endless:
    """Supplies trials until two workers have run some, or twenty seconds are over."""

    def __init__(self) -> None:
        self.asked, self.processes, self.began = 0, set[int](), time.monotonic()

    def next(self) -> TrialSpec | None:
        self.asked += 1
        over = len(self.processes) > 1 or time.monotonic() > self.began + 20
        return None if over else TrialSpec(self.asked, {})

    def finished(self, number: int, result: TrialResult) -> None:
        if not self.processes:
            self.began = time.monotonic()
        self.processes.add(result.size_bytes)


def test_a_worker_that_starts_late_is_not_given_up(tmp_path: Path) -> None:
    """Trials that are shorter than the start of a worker are run by all workers, too."""
    (tmp_path / "ready").mkdir()
    connection, supply = start_ray(2), Endless()
    try:
        payload = cloudpickle.dumps(lambda: Instant(tmp_path / "ready"))
        run_trials(payload, supply, 10_000, 2, 0.0, tmp_path)
    finally:
        connection.close()
    assert len(supply.processes) == 2
