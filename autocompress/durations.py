"""Lengths of time, as people write and read them."""

from __future__ import annotations

import re

from autocompress.errors import TargetError

_PATTERN = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str | int | float) -> float:
    """Seconds of `text`: 90, "90", "90s", "30m", "1.5h", "1h30m". Raises TargetError for anything else."""
    match = _PATTERN.fullmatch(str(text).replace(" ", "").lower())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise TargetError(f"time {text!r} is not understood: write seconds or a unit, like 90s, 30m or 1h30m")
    return total


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
