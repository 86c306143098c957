from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import TargetError
from autocompress.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("20KB", 20_000), ("20 kb", 20_000), ("1.5MiB", 1_572_864), ("16KiB", 16_384), ("2MB", 2_000_000), (77, 77)],
)
def test_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KB", "-3KB", "20XB", "0", "1e3", "0.1B"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match="size"):
        parse_size(text)


@given(st.integers(1, 10**11))
def test_short_form_is_close(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.01 * size
