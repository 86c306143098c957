"""Lengths of time come back as seconds; what is none is told so."""

from __future__ import annotations

import pytest

from autocompress.durations import parse_duration
from autocompress.errors import TargetError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), (90, 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("1h 2m 3s", 3723)],
)
def test_durations(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-3m", "3 days", "1m2h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match="write seconds or a unit"):
        parse_duration(text)
