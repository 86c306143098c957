"""A search on a Ray cluster that others started: two nodes on loopback, each with a core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
from ray.cluster_utils import Cluster

import autocompress as ac
from autocompress.agent import engine
from autocompress.errors import RunError
from tests import mini

NODE = {"num_cpus": 1, "node_ip_address": engine.LOOPBACK, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(engine._token_file()))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would make the host's own address of loopback's
        with mock.patch("ray._private.services.resolve_ip_for_localhost", lambda host: host):
            made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
            made.add_node(**NODE)
            yield made
            made.shutdown()


def test_trials_run_on_all_nodes_and_outlive_one_of_them(cluster: Any, tmp_path: Path) -> None:
    lost: list[Any] = []

    def lose_a_node(progress: ac.Progress) -> None:
        if progress.done == 2 and not lost:
            lost.append(cluster.list_all_nodes()[-1])
            cluster.remove_node(lost[0], allow_graceful=False)

    front = ac.search(mini.slow_task(), 6, run=tmp_path / "run", address=cluster.address, listener=lose_a_node)
    assert lost
    assert len(front) > 0
    assert (tmp_path / "run" / "log").read_text().count(" bytes, validation accuracy ") == 6
    assert not list((tmp_path / "run").glob(".tune-*"))
    assert not ray.is_initialized()


def test_what_the_caller_is_connected_to_is_used(cluster: Any, in_tmp: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert len(ac.search(mini.task(), 2, run="runs/mine", quiet=True)) > 0
        assert "a Tune run ended early" not in Path("runs/mine/log").read_text()
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_node_that_could_not_run_trials_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with pytest.raises(RunError, match=r"does not see the run folder .* give --run a folder on storage"):
            engine.join_ray("auto", tmp_path / "missing" / "log")
        monkeypatch.setattr(engine, "__version__", "0.0.1")
        with pytest.raises(RunError, match=r"^node 127.0.0.1 of the cluster has autocompress .*, here it is 0.0.1"):
            engine.join_ray("auto", tmp_path)
        assert ray.is_initialized()  # who was connected before stays connected
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "is not one that a search can join"),
        ("head", "is not one that a search can join"),
        ("127.0.0.1:1", "there is no Ray cluster to join at '127.0.0.1:1'"),
        ("127.0.0.1:99999", "there is no Ray cluster to join"),
    ],
)
def test_addresses_that_lead_nowhere(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=said):
        ac.search(mini.task(), 2, run=tmp_path / "run", address=address)
    assert not (tmp_path / "run").exists()
