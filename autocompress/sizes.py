"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from autocompress.errors import TargetError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str | int | float) -> int:
    """Bytes of `text`: 20000, "20000", "20KB" (1 KB = 1000 bytes), "20 KiB" (1 KiB = 1024 bytes).

    Units: B, KB, MB, GB (powers of 1000) and KiB, MiB, GiB (powers of 1024), in any case.
    Raises TargetError for anything else and for sizes below one byte.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise TargetError(f"size {text!r} is not understood: write bytes or a unit, like 20KB or 1.5MiB")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise TargetError(f"size {text!r} is less than one byte: give a positive size, like 20KB")
    return size


def format_size(size_bytes: float) -> str:
    """Short decimal form: 999 B, 5.13 KB, 1.25 MB (1 KB = 1000 bytes)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size_bytes >= 0.9995 * factor:
            value = size_bytes / factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{size_bytes:.0f} B"
