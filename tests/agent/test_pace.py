"""How many trials fit into the time that is left."""

from __future__ import annotations

import time

import pytest

from autocompress.agent.pace import Pace


def test_what_fits_follows_the_pace_and_no_trial_begins_that_would_end_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(60)
    now = 110.0
    pace.start(finished=2)
    now = 130.0
    assert pace.fits(finished=6) == 6 + 6, "four in twenty seconds, and thirty are left"
    assert not pace.late([9.0, 10.0, 29.0])
    assert pace.late([9.0, 31.0, 35.0])
    now = 161.0
    assert pace.late([])
    assert pace.fits(finished=6) == 6


def test_without_a_limit_nothing_is_late() -> None:
    assert not Pace(None).late([1e9])
