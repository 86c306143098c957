"""Ray as we start it: silent, private, on loopback."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from ray.tune.utils.object_cache import _ObjectCache

from autocompress.agent.engine import start_ray
from autocompress.agent.tuning import Rungs


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
