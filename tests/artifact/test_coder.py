"""The entropy coder gives back what it was given, and is near the limit."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autocompress.artifact.coder import Array, CoderState, Scan

PLAIN = Scan()


def encode(values: Array, scan: Scan = PLAIN, exponent: int = 0, mantissa: int = 7) -> bytes:
    state = CoderState()
    state.code(values.copy(), scan, exponent, mantissa)
    return state.finish()


def decode(stream: bytes, shape: tuple[int, int], scan: Scan = PLAIN, exponent: int = 0, mantissa: int = 7) -> Array:
    out = np.zeros(shape, np.int32)
    CoderState(stream).code(out, scan, exponent, mantissa)
    return out


matrices = hnp.arrays(
    np.int32,
    st.tuples(st.integers(1, 12), st.integers(1, 40)),
    elements=st.one_of(st.just(0), st.integers(-3, 3), st.integers(-128, 127)),
)


@settings(max_examples=200, deadline=None)
@given(matrices, st.builds(Scan, st.sampled_from([1, 3, 9]), st.integers(0, 9), st.booleans()))
def test_integers_come_back(values: Array, scan: Scan) -> None:
    assert np.array_equal(decode(encode(values, scan), values.shape, scan), values)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, (3, 20), elements=st.integers(-(2**15), 2**15)))
def test_integers_of_sixteen_bits_come_back(values: Array) -> None:
    assert np.array_equal(decode(encode(values, mantissa=15), values.shape, mantissa=15), values)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 8), st.integers(1, 30)), elements=st.integers(0, 2**31 - 1)),
    st.sampled_from([(5, 10), (8, 7), (8, 3), (8, 5)]),
)
@example(np.full((1, 40), 65535, np.int32), (5, 10))  # codes to nothing but zero bytes
def test_float_patterns_come_back(values: Array, layout: tuple[int, int]) -> None:
    values = values & ((1 << (1 + sum(layout))) - 1)
    assert np.array_equal(decode(encode(values, Scan(), *layout), values.shape, Scan(), *layout), values)


def test_several_tensors_share_one_stream() -> None:
    rng = np.random.default_rng(0)
    tensors = [rng.integers(-3, 4, (5, n)).astype(np.int32) for n in (1, 40, 7)]
    writer = CoderState()
    for tensor in tensors:
        writer.code(tensor.copy(), Scan(), 0, 3)
    reader = CoderState(writer.finish())
    for tensor in tensors:
        out = np.zeros_like(tensor)
        reader.code(out, Scan(), 0, 3)
        assert np.array_equal(out, tensor)


def entropy_bytes(values: Array) -> float:
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() * values.size / 8)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "slack"), [(20, 1.20), (400, 1.05)])
def test_independent_values_cost_about_their_entropy(density: float, rows: int, slack: float) -> None:
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(0, 2.5, (rows, 100))).clip(-8, 7).astype(np.int32)
    values *= rng.random(values.shape) < density
    assert len(encode(values, mantissa=3)) <= slack * entropy_bytes(values) + 12


def test_structure_is_cheaper_than_entropy() -> None:
    """Whole rows and columns of zeros, as pruning leaves them."""
    rng = np.random.default_rng(0)
    values = rng.integers(-4, 5, (100, 100)).astype(np.int32)
    values[rng.random(100) < 0.6] = 0
    values[:, rng.random(100) < 0.6] = 0
    assert len(encode(values, mantissa=3)) < 0.6 * entropy_bytes(values)


def test_zeros_are_nearly_free() -> None:
    assert len(encode(np.zeros((1000, 1000), np.int32))) < 200


def test_where_nothing_can_be_kept_it_is_compiled_anew() -> None:
    """As in a container that is read-only and has no home."""
    nowhere = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    nowhere.pop("NUMBA_CACHE_DIR", None)
    code = "from tests.artifact.test_coder import *; print(*decode(encode(np.eye(2, dtype=np.int32)), (2, 2)).flat)"
    run = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, check=False)
    assert run.stdout == "1 0 0 1\n", run.stderr
