"""How many trials fit into the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

import autocompress as ac
from autocompress.agent import engine, pace
from autocompress.agent.pace import Pace
from autocompress.agent.supply import Supply
from autocompress.trial.workshop import TrialResult, TrialSpec, Workshop
from tests import mini
from tests.conftest import trials_run_here


def test_what_fits_follows_the_pace_and_no_trial_begins_that_would_end_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(60)
    now = 130.0
    assert pace.fits(2, [4.0, 5.0, 9.0]) == 12, "six of five seconds for each of the two workers"
    assert not pace.late([9.0, 10.0, 29.0])
    assert pace.late([9.0, 10.0, 31.0])
    assert not pace.late([9.0] * 9 + [31.0]), "one in ten may"
    now = 161.0
    assert pace.late([])
    assert pace.fits(2, [5.0]) == 0


def test_without_a_limit_nothing_is_late() -> None:
    assert not Pace(None).late([1e9])


def test_no_worker_waits_for_the_others_while_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def trials(payload: bytes, supply: Supply, *_: Any) -> None:
        workshop: Workshop = cloudpickle.loads(payload)()

        def asked() -> Iterator[TrialSpec]:
            while (spec := supply.next()) is not None:
                yield spec

        def finish(spec: TrialSpec) -> None:
            *_, result = workshop.run(spec)
            assert isinstance(result, TrialResult)
            supply.finished(spec.number, replace(result, seconds=98.0))

        proposed = asked()
        running = [next(proposed) for _ in range(6)]
        for clock.now in (100.0, 101.0, 250.0):
            finish(running.pop(0))
            running += [spec] if (spec := next(proposed, None)) else []
        assert [spec.number for spec in running] == [3, 4, 5, 6, 7], "two more begin, a third would end late"
        for spec in running:
            finish(spec)

    with trials_run_here():
        monkeypatch.setattr(engine, "run_trials", trials)
        seen: list[ac.Progress] = []
        ac.search(mini.task(), time_budget="300s", run=tmp_path / "run", workers=6, listener=seen.append)
    counts = [(p.done, p.budget) for p in seen if p.phase == "searching"]
    assert (1, 1 + 12) in counts, "a third of the time is over, and six workers have two more trials each"
    assert (seen[-1].done, seen[-1].budget) == (8, 8)
