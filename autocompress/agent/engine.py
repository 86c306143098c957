"""Ray Tune runs the trials: placement, transport, restarts. What to run is the study's to say.

One `fit()` is never trusted with the whole search: whatever ends it early (a killed worker, a lost
node) is an event after which the controller starts a new one for what remains.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from autocompress.agent.supply import Supply
from autocompress.errors import RunError, in_words
from autocompress.version import __version__

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # its answer to a signal is a trace of the stack
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a task may read files by names that are relative to the current folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "PL_DISABLE_FORK": "1",  # as Tune has it
}
LOOPBACK = "127.0.0.1"
_IMPORTED = {"RAY_preload_python_modules": "autocompress.agent.tuning,torch._dynamo"}
"""By workers, while they wait for work; every optimiser of torch imports the second."""
_UNUSED = [f"ray._private.node.Node.start_{process}" for process in ("monitor", "log_monitor", "api_server")]
"""Of a private Ray: what adds machines, what passes logs on and the dashboard would take seconds, memory and a port,
and serve no one."""
_ASKED = [f"ray.tune.execution.class_cache.{names}" for names in ("DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE")]
"""Variables that Tune wants its workers to have. Those of a private Ray that wait for work have them, but Ray would
start others for it, which takes seconds."""
_PATIENCE = 120
"""Seconds in which a node must answer; its first worker may have to import torch from a slow disk."""


_PRIVATE = threading.Lock()
"""Held while this process has a private Ray; there cannot be two."""


@dataclass(frozen=True)
class Connection:
    """To a Ray that runs trials. folder: of a private Ray, None on a cluster. shared: with the caller, who was
    connected before."""

    folder: Path | None = None
    shared: bool = False
    closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def close(self) -> None:
        """Ends a private Ray, leaves a cluster as it is."""
        import ray

        if not self.shared:
            ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            _PRIVATE.release()
        self.closed.set()


class Cluster:
    """The Ray of a search: one that is running, and joined, or a private one, which starts while something else is
    done here. connection: None until it is there."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self._starting: Future[Connection] | None = None

    def join(self, address: str, sample: Path) -> None:
        """See `join_ray`."""
        self.connection = join_ray(address, sample)

    def size(self) -> tuple[int, int]:
        """(CPU cores, GPUs) of all its nodes; before a private one is there, of this machine, and of eight cores at
        most."""
        if self.connection is None:
            return min(os.cpu_count() or 1, 8), torch.cuda.device_count()
        import ray

        found = ray.cluster_resources()
        return max(1, int(found.get("CPU", 0))), int(found.get("GPU", 0))

    def start(self, workers: int) -> None:
        """Have a private one for so many workers on its way, unless one is there."""
        if self.connection is None and self._starting is None:
            self._starting = starting_ray(workers)

    def wait(self, workers: int) -> None:
        """Until it is there. Raises RunError when it does not start."""
        self.start(workers)
        if self.connection is None and self._starting is not None:
            self.connection = self._starting.result()

    def scratch(self, folder: Path) -> Path:
        """Where Ray Tune may write: of a cluster all nodes share `folder`, that of the run."""
        return (self.connection and self.connection.folder) or folder

    def close(self) -> None:
        """Ends what was started, leaves what was joined."""
        if self._starting is not None and self._starting.exception() is None:
            self.connection = self._starting.result()
        if self.connection is not None:
            self.connection.close()


def starting_ray(workers: int) -> Future[Connection]:
    """`start_ray`, while something else is done here: it takes seconds, mostly of waiting."""
    os.environ.update(_SETTINGS)  # some are read when ray is imported
    import autocompress.agent.tuning  # noqa: F401  (not in the thread: filters of warnings are the whole process's)

    started: Future[Connection] = Future()

    def start() -> None:
        try:
            connection = start_ray(workers)
        except BaseException as error:  # whoever waits for it is told
            started.set_exception(error)
        else:
            started.set_result(connection)
            connection.closed.wait()  # Ray's processes would end with the thread that started them

    threading.Thread(target=start, daemon=True).start()
    return started


@cache
def _token_file() -> Path:
    """Holds what Ray's processes show each other: the same as long as this process runs, because Ray's client remembers
    the first it read, and others may start Ray again."""
    handle, path = tempfile.mkstemp(prefix="acz-token-")  # for its owner's eyes only
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    atexit.register(Path(path).unlink, missing_ok=True)
    return Path(path)


def start_ray(workers: int) -> Connection:
    """A private Ray on loopback, silent, for so many workers. Raises RunError when it does not start, or another search
    of this process has one."""
    if not _PRIVATE.acquire(blocking=False):
        raise RunError("another search of this process is running: wait for its end, or search in a process of its own")
    os.environ.update(_SETTINGS)
    if not torch.cuda.is_available():  # what looks for GPUs when it is imported would see those of others
        os.environ.update(_IMPORTED)
    folder = Path(tempfile.mkdtemp(prefix="acz-", dir="/tmp" if Path("/tmp").is_dir() else None))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    import ray

    try:
        # left to itself, Ray rewrites a loopback address to the host's own and listens on every interface
        loopback = mock.patch("ray._private.services.resolve_ip_for_localhost", lambda host: host)
        with loopback, _replaced(_UNUSED, lambda *_, **__: None):
            ray.init(
                address="local",
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder / "ray"),
                object_store_memory=256 * 2**20,
            )
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        _PRIVATE.release()
        raise RunError(f"Ray did not start: {error}") from error
    return Connection(folder)


def is_connected() -> bool:
    """Whether the caller has a Ray in this process."""
    return not _PRIVATE.locked() and "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def join_ray(address: str, sample: Path) -> Connection:
    """A cluster that is running: at "auto" (this node's, or the job's), or at host:port.

    sample: a file of the run folder, which every node must see. Raises RunError when there is no such cluster, or a
    node of it lacks the file or this version of autocompress.
    """
    _check_address(address)
    os.environ.update(_SETTINGS)
    import ray

    connection = Connection(shared=ray.is_initialized())
    if not connection.shared:
        try:
            with _signals_kept():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise RunError(f"there is no Ray cluster to join at {address!r}: {in_words(error)}") from error
    try:
        _check_nodes(sample)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Who asks the process to end is answered as before, and not by Ray."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Refuses at once what Ray would try to reach for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise RunError(
            f"address {address!r} is not one that a search can join: give 'auto' on a node of the cluster or in a job, "
            "or the host:port that 'ray start --head' printed"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"there is no Ray cluster to join at {address!r}: {error}") from error


def _check_nodes(sample: Path) -> None:
    import ray
    from ray.exceptions import TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look, asked = ray.remote(num_cpus=0)(_look), []
    for node in ray.nodes():
        if node["Alive"]:
            there = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            asked.append((node["NodeManagerAddress"], there.remote(str(sample.resolve()))))
    for host, answer in asked:
        try:
            version, seen = ray.get(answer, timeout=_PATIENCE)
        except TaskUnschedulableError:
            continue  # it was lost a moment ago
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(f"node {host} of the cluster cannot run autocompress: {reason}; install it there") from error
        if version != __version__:
            raise RunError(f"node {host} of the cluster has autocompress {version}, here it is {__version__}")
        if not seen:
            raise RunError(
                f"node {host} of the cluster does not see the run folder {str(sample.parent.resolve())!r}: "
                "give --run a folder on storage that all nodes share"
            )


def _look(sample: str) -> tuple[str, bool]:
    return __version__, Path(sample).is_file()


def measure_profile(
    payload: bytes, workers: int, gpus: float, progress: Callable[[float], None], probes: int
) -> list[dict[str, Any]]:
    """The parts of the profile, measured by so many workers of the running Ray; two parts a worker.

    payload, gpus: as in `run_trials`. probes: as in `Workshop.base_profile`.
    """
    import ray
    from ray.util import ActorPool

    actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Measurer)
    pool, count = ActorPool([actor.remote(payload) for _ in range(workers)]), 2 * workers
    measured = pool.map_unordered(lambda measurer, part: measurer.measure.remote(part, count, probes), [*range(count)])
    parts: list[dict[str, Any]] = []
    for part in measured:
        parts.append(part)
        progress(len(parts) / count)
    return parts


class _Measurer:
    def __init__(self, payload: bytes) -> None:
        import cloudpickle
        import torch

        torch.set_num_threads(1)
        self.workshop = cloudpickle.loads(payload)()

    def measure(self, part: int, parts: int, probes: int) -> dict[str, Any]:
        measured: dict[str, Any] = self.workshop.profile_part(part, parts, probes=probes)
        return measured


def run_trials(payload: bytes, supply: Supply, remaining: int, workers: int, gpus: float, scratch: Path) -> None:
    """One Tune run of up to `remaining` trials, `workers` at a time; returns when it ends, however.

    payload: cloudpickle of a function that makes a worker's `Workshop`.
    """
    from ray import tune

    from autocompress.agent.tuning import Proposals, Rungs, TrialWorker

    numbers: dict[str, int] = {}
    trainable = tune.with_resources(
        tune.with_parameters(TrialWorker, payload=payload),
        {"cpu": 1, **({"gpu": gpus} if gpus else {})},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Proposals(supply, numbers),
            scheduler=Rungs(supply, numbers, workers),
            num_samples=remaining,
            max_concurrent_trials=workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch.resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    log = logging.getLogger("ray.tune")
    before = log.level
    log.setLevel(logging.ERROR)  # as in a private Ray: it misses files that nobody needs
    try:
        with _replaced(_ASKED, {}) if _PRIVATE.locked() else nullcontext():
            tuner.fit()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception:
        logging.getLogger("autocompress").warning("a Tune run ended early:\n%s", traceback.format_exc())
    finally:
        log.setLevel(before)


@contextmanager
def _replaced(names: list[str], by: Any) -> Iterator[None]:
    """Those of them that this Ray has: without, it is only slower."""
    with ExitStack() as stack:
        for name in names:
            with suppress(ImportError, AttributeError):
                stack.enter_context(mock.patch(name, by))
        yield
