"""What Ray Tune is given: where candidates come from, who stops them, who runs them.

Kept apart from `engine.py` because it imports ray, which the command line does not need for its help.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from autocompress.agent.supply import Supply
from autocompress.trial.workshop import Rung, TrialResult, TrialSpec


class Proposals(Searcher):
    """Tune's view of the supply; pickles nothing of it. numbers: Tune's trial id -> trial number."""

    def __init__(self, supply: Supply, numbers: dict[str, int]) -> None:
        super().__init__()
        self._supply, self._numbers = supply, numbers

    def suggest(self, trial_id: str) -> Any:
        spec = self._supply.next()
        if spec is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = spec.number
        return {"spec": json.dumps(asdict(spec))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Rungs are the scheduler's."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        event = json.loads((result or {}).get("event", "{}"))
        if error or not event:
            self._supply.lost(number)
        elif event["kind"] == "result":
            self._supply.finished(number, TrialResult(**event["value"]))
        elif event["kind"] == "error":
            self._supply.failed(number, event["value"])
        else:
            self._supply.stopped(number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study in the run folder is the state of the search."""
        Path(checkpoint_path).write_text("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Never used: a crash is answered with a new Tune run."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Rungs(FIFOScheduler):
    """Stops what the controller calls dominated, and keeps the workers."""

    def __init__(self, supply: Supply, numbers: dict[str, int], workers: int) -> None:
        self._supply, self._numbers = supply, numbers
        self._kept = workers

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """By itself Tune keeps one idle worker; others it ends, and starts new ones, which takes seconds."""
        with suppress(AttributeError):  # a Tune that has no such cache
            tune_controller._actor_cache.increase_max(trial.placement_group_factory, self._kept)
            self._kept = 0

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first that has no worker yet. Tune would give a worker that became free the trial of one that is about to
        start, and end that one: where trials take less time than workers to start, there would never be a second."""
        taken = getattr(tune_controller, "_trial_to_actor", {})
        waiting = (t for t in tune_controller.get_trials() if t.status == Trial.PENDING and t not in taken)
        return next(waiting, None)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        event = json.loads(result["event"])
        number = self._numbers.get(trial.trial_id)
        if event["kind"] == "rung" and number is not None and self._supply.rung(number, Rung(**event["value"])):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialWorker(tune.Trainable):
    """Runs one trial after another in one process; nothing of a trial outlives it."""

    def setup(self, config: dict[str, Any], payload: bytes = b"") -> None:
        self._workshop: Any = None
        self._broken = ""
        try:
            import cloudpickle
            import torch

            torch.set_num_threads(1)
            self._workshop = cloudpickle.loads(payload)()
        except Exception:
            self._broken = traceback.format_exc()
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        spec = TrialSpec(**json.loads(config["spec"]))
        self._events: Iterator[Rung | TrialResult] = iter(()) if self._broken else self._workshop.run(spec)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._broken:
            return {"event": json.dumps({"kind": "error", "value": self._broken}), "done": True}
        try:
            event = next(self._events)
        except Exception:
            return {
                "event": json.dumps({"kind": "error", "value": traceback.format_exc()}),
                "done": True,
            }
        done = isinstance(event, TrialResult)
        return {
            "event": json.dumps({"kind": "result" if done else "rung", "value": asdict(event)}),
            "done": done,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial that is interrupted is run again."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Never used."""
