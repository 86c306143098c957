"""Ray Tune runs the trials: placement, transport, restarts. What to run is the study's to say.

One `fit()` is never trusted with the whole search: whatever ends it early (a killed worker, a lost
node) is an event after which the controller starts a new one for what remains.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from autocompress.errors import RunError
from autocompress.trial import Rung, TrialResult, TrialSpec

_SILENCE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}
_TOKEN = secrets.token_hex(32)
"""What Ray's processes show each other; one a process, because Ray's client remembers the first it read."""
LOOPBACK = "127.0.0.1"


class Supply(Protocol):
    """What an engine needs of the controller. Called from one thread."""

    def next(self) -> TrialSpec | None:
        """The next trial, or None when the budget is spent."""

    def rung(self, number: int, rung: Rung) -> bool:
        """Take note of a rung; True when the trial should stop here."""

    def finished(self, number: int, result: TrialResult) -> None: ...

    def stopped(self, number: int) -> None: ...

    def failed(self, number: int, reason: str) -> None: ...


def start_ray(workers: int) -> Path:
    """A private Ray on loopback, silent; returns its temporary folder for `stop_ray`."""
    os.environ.update(_SILENCE)
    folder = Path(tempfile.mkdtemp(prefix="acz-", dir="/tmp" if Path("/tmp").is_dir() else None))
    token = folder / "token"
    token.touch(0o600)
    token.write_text(_TOKEN)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    import ray

    try:
        # left to itself, Ray rewrites a loopback address to the host's own and listens on every interface
        with mock.patch("ray._private.services.resolve_ip_for_localhost", lambda host: host):
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
        raise RunError(f"Ray did not start: {error}") from error
    return folder


def stop_ray(folder: Path) -> None:
    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def measure_profile(
    payload: bytes, workers: int, gpus: float, progress: Callable[[float], None]
) -> list[dict[str, Any]]:
    """The parts of the profile, measured by so many workers of the running Ray; two parts a worker.

    payload, gpus: as in `run_trials`.
    """
    import ray
    from ray.util import ActorPool

    actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Measurer)
    pool, count = ActorPool([actor.remote(payload) for _ in range(workers)]), 2 * workers
    measured = pool.map_unordered(lambda measurer, part: measurer.measure.remote(part, count), [*range(count)])
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

    def measure(self, part: int, parts: int) -> dict[str, Any]:
        measured: dict[str, Any] = self.workshop.profile_part(part, parts)
        return measured


def run_trials(payload: bytes, supply: Supply, remaining: int, workers: int, gpus: float, scratch: Path) -> None:
    """One Tune run of up to `remaining` trials, `workers` at a time; returns when it ends, however.

    payload: cloudpickle of a function that makes a worker's `Workshop`.
    """
    from ray import tune

    from autocompress.search.tuning import Proposals, Rungs, TrialWorker

    numbers: dict[str, int] = {}
    trainable = tune.with_resources(
        tune.with_parameters(TrialWorker, payload=payload),
        {"cpu": 1, **({"gpu": gpus} if gpus else {})},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Proposals(supply, numbers),
            scheduler=Rungs(supply, numbers),
            num_samples=remaining,
            max_concurrent_trials=workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception:
        logging.getLogger("autocompress").warning("a Tune run ended early:\n%s", traceback.format_exc())
