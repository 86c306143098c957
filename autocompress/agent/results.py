"""What a run has found: the front, as it stands and at the end, and the weights that are still needed."""

from __future__ import annotations

import json
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from autocompress.agent.run_folder import REPORT
from autocompress.agent.study import SearchStudy
from autocompress.artifact import load
from autocompress.errors import RunError
from autocompress.files import ARTIFACT, CHECKPOINT, RECIPE, write_file
from autocompress.front import FRONT_FILE, Base, FrontPoint, ParetoFront, non_dominated
from autocompress.task import measure
from autocompress.trial.workshop import Workshop


@dataclass(frozen=True)
class Results:
    """space: its name. base: the original's file and accuracies."""

    workshop: Workshop
    space: str
    base: Base
    study: SearchStudy

    def keep(self) -> None:
        """After each trial: write the front, and drop the weights of trials that will be no one's parent."""
        self._write(self._front(final=False))
        to_come = self.study.trials(TrialState.RUNNING, TrialState.WAITING)
        keep = {trial.user_attrs.get("parent") for trial in to_come}
        keep |= {trial.number for trial in self._members()}
        for trial in self.study.complete():
            if trial.number not in keep:
                (self.workshop.trial_folder(trial.number) / CHECKPOINT).unlink(missing_ok=True)

    def final_front(self) -> ParetoFront:
        """The front with its test accuracies, written and drawn. Raises RunError when no trial finished."""
        folder = self.workshop.folder
        if not self.study.complete():
            failed = [t for t in self.study.trials() if t.user_attrs.get("error")]
            last = failed[-1].user_attrs["error"].strip().splitlines()[-1] if failed else "no trial finished"
            larger = "" if self.study.remaining() > 0 else " with a larger --budget"
            raise RunError(
                f"every trial of run {str(folder)!r} failed; the last one said: {last} "
                f"(once that is mended, --resume{larger} goes on)"
            )
        front = self._front(final=True)
        self._write(front)
        for suffix in ("png", "svg"):
            front.plot(folder / f"front.{suffix}")
        front.report(folder / REPORT)
        return front

    def _members(self) -> list[FrozenTrial]:
        """Trials that no other one dominates."""
        done = self.study.complete()
        return [done[i] for i in non_dominated([(t.values[0], t.values[1]) for t in done])]

    def _front(self, final: bool) -> ParetoFront:
        """`final` measures the test split, once, on the decoded files."""
        task, folder, points = self.workshop.task, self.workshop.folder, []
        for trial in self._members():
            place = self.workshop.trial_folder(trial.number)
            path = place / ARTIFACT
            points.append(
                FrontPoint(
                    trial.number,
                    path.stat().st_size,
                    trial.values[1],
                    measure(task, load(path, task.build).to(self.workshop.device), "test") if final else None,
                    path.relative_to(folder).as_posix(),
                    json.loads((place / RECIPE).read_text()),
                    trial.user_attrs.get("parent"),
                    round(float(trial.user_attrs["seconds"]), 3),
                    folder,
                )
            )
        return ParetoFront(task.name, self.space, self.workshop.seed, self.base, tuple(points), folder)

    def _write(self, front: ParetoFront) -> None:
        write_file(self.workshop.folder / FRONT_FILE, (json.dumps(front.to_json(), indent=1) + "\n").encode())
