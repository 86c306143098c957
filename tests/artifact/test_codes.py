"""How tensors of codes are written: any shape comes back, and the writer finds the cheaper ways."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autocompress.artifact.coder import Array, CoderState, Scan
from autocompress.artifact.codes import read_codes, vertical, write_codes
from autocompress.trial.probing import coded_bytes

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=9)
gappy = st.sampled_from([0, 0, -5, 7, 40, -128, 127])


def written(codes: Array, mantissa: int = 7) -> bytes:
    state = CoderState()
    write_codes(state, codes, 0, mantissa)
    return state.finish()


def plain(codes: Array, mantissa: int = 7) -> int:
    """Bytes without any choice."""
    state = CoderState()
    state.code(codes.reshape(len(codes), -1).copy(), Scan(), 0, mantissa)
    return len(state.finish())


@settings(max_examples=150, deadline=None)
@given(st.lists(shapes.flatmap(lambda s: hnp.arrays(np.int32, s, elements=st.integers(-128, 127) | gappy)), max_size=3))
def test_codes_of_any_shape_come_back(tensors: list[Array]) -> None:
    state = CoderState()
    for codes in tensors:
        write_codes(state, codes, 0, 7)
    reader = CoderState(state.finish())
    for codes in tensors:
        assert np.array_equal(read_codes(reader, codes.shape, 0, 7), codes)


def test_magnitudes_that_do_not_occur_cost_nothing() -> None:
    """Magnitude pruning leaves no code between zero and its threshold, a coarser parent leaves only multiples."""
    rng = np.random.default_rng(0)
    codes = np.rint(rng.laplace(0, 6, (40, 9, 3, 3))).astype(np.int32).clip(-31, 31)
    codes[abs(codes) < 7] = 0
    dense = codes - 6 * np.sign(codes)
    assert len(written(codes, 5)) < 1.02 * len(written(dense, 5))
    assert len(written(4 * codes, 7)) < 1.02 * len(written(codes, 5))


def test_codes_come_back_whatever_their_order_in_memory() -> None:
    """As the weights of convolutions in channels-last order are."""
    codes = np.random.default_rng(0).choice([-5, 0, 7], (6, 3, 3, 4)).astype(np.int32).transpose(0, 3, 1, 2)
    assert np.array_equal(read_codes(CoderState(written(codes)), codes.shape, 0, 7), codes)


def test_input_channels_first_when_they_differ() -> None:
    rng = np.random.default_rng(0)
    share = rng.random(24)[None, :, None, None] ** 2
    codes = (rng.random((24, 24, 3, 3)) < share).astype(np.int32)
    assert len(written(codes)) < 0.99 * plain(codes)


def test_the_width_of_an_image_is_found_and_pays() -> None:
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(30, 16 + 2, 20))
    smooth = (picture[:, :-2] + 2 * picture[:, 1:-1] + picture[:, 2:]).reshape(30, -1)
    codes = np.rint(smooth * 1.5).astype(np.int32).clip(-16, 15)
    assert vertical(codes) == 20
    assert vertical(rng.integers(-3, 4, (50, 300))) == 0
    assert len(written(codes, 4)) < 0.95 * plain(codes, 4)


def test_a_matrix_is_turned_when_that_is_cheaper() -> None:
    """Smooth from row to row, as a layer that reads a signal in time."""
    rng = np.random.default_rng(0)
    smooth = np.apply_along_axis(np.convolve, 0, rng.normal(size=(200, 30)), [1, 2, 1], "same")
    codes = np.rint(smooth * 1.5).astype(np.int32).clip(-16, 15)
    assert len(written(codes, 4)) < 0.95 * plain(codes, 4)
    assert abs(len(written(codes.T.copy(), 4)) - len(written(codes, 4))) < 8


def test_a_matrix_of_low_rank_is_predicted() -> None:
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(200, 120))
    low_rank = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 120)) / 2
    for matrix, share in ((low_rank + 0.3 * independent, 0.8), (independent, 1.002)):
        codes = np.rint(2 * matrix).astype(np.int32).clip(-8, 7)
        data = written(codes, 3)
        assert len(data) < share * plain(codes, 3)
        assert np.array_equal(read_codes(CoderState(data), codes.shape, 0, 3), codes)


@settings(max_examples=60, deadline=None)
@given(shapes.flatmap(lambda s: hnp.arrays(np.int32, s, elements=st.integers(-7, 7))), st.data())
def test_repeated_rows_are_written_once(codes: Array, data: st.DataObject) -> None:
    if codes.ndim:
        codes = codes[data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=30))]
    state = CoderState()
    write_codes(state, codes, 0, 3, repeats=True)
    assert np.array_equal(read_codes(CoderState(state.finish()), codes.shape, 0, 3, repeats=True), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(500, 20_000), st.floats(0, 0.999), st.integers(0, 99))
def test_no_other_way_to_store_a_sparse_tensor_is_smaller(size: int, zeros: float, seed: int) -> None:
    """Dense, as a bitmap, or as gaps (Rice codes of the best parameter), each with packed 4-bit values: what the
    coder spends on zeros follows how many there are, so nothing is stored dense if sparse is smaller."""
    generator = np.random.default_rng(seed)
    rows = max(1, math.isqrt(size // 4))
    codes = np.clip(np.round(generator.laplace(0, 2, (rows, size // rows))), -7, 7).astype(np.int32)
    codes[codes == 0] = 1
    codes[generator.random(codes.shape) < zeros] = 0
    nonzero = np.flatnonzero(codes)
    gaps = np.diff(nonzero, prepend=-1) - 1
    positions = min(int(((gaps >> k) + 1 + k).sum()) for k in range(16))
    best = min(4 * codes.size, codes.size + 4 * len(nonzero), positions + 4 * len(nonzero)) / 8
    assert coded_bytes(codes, 0, 3) <= best + 5  # bytes of the peers' counts and parameters, which they need too
