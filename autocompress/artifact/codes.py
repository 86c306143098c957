"""One tensor of codes in the stream: how it is walked.

The writer measures the ways that are worth a try by coding with them, on a part of a large tensor, and
takes the one of least bytes; what it chose stands before the codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from autocompress.artifact.coder import RANK, Array, CoderState, Scan

_SAMPLE = 1 << 17
"""Codes on which ways to code a tensor are compared."""
_WORTH = 1 / 500
"""Share of the bytes that factors must save: with them, coding takes twice the time."""
_FACTORS = 2
"""The question whether a tensor is coded with factors, to `CoderState.flag`."""
_LONGEST = 512
"""Largest width that is looked for, in columns."""


class Walk(NamedTuple):
    """transposed: the second dimension first. scan: how the coder walks the matrix that comes of it."""

    transposed: bool = False
    scan: Scan = Scan()

    def turn(self, cube: Array) -> Array:
        """[rows, columns x kernel], contiguous, of [rows, columns, kernel] or, transposed, [columns, rows, kernel]."""
        turned = cube.transpose(1, 0, 2) if self.transposed else cube
        return np.ascontiguousarray(turned).reshape(len(turned), -1)


def write_codes(state: CoderState, codes: Array, exponent: int, mantissa: int, repeats: bool = False) -> None:
    """Write int32 codes of any shape (layout as in `CoderState.code`). repeats: each row once."""
    if repeats and codes.ndim > 1:
        places: dict[bytes, int] = {}
        for row in codes:
            state.number(places.setdefault(row.tobytes(), len(places)))
        codes = np.stack([np.frombuffer(row, codes.dtype) for row in places]).reshape(-1, *codes.shape[1:])
    cube = codes.reshape(_cube(codes.shape))
    if exponent:
        state.code(Walk().turn(cube), Scan(), exponent, mantissa)
        return
    walks = [_of_shape(codes.shape)]
    if min(cube.shape[:2]) > 1:
        walks = _walks(cube) if codes.ndim == 2 else [*walks, walks[0]._replace(transposed=True)]
    costs = [_cost(state, _part(walk, cube), walk.scan, mantissa) for walk in walks]
    walk = walks[costs.index(min(costs))]
    if min(cube.shape[:2]) > 1:
        _walk_in_stream(state, walk, codes.ndim)
    turned, scan = walk.turn(cube), walk.scan
    if _has_factors(turned.shape, mantissa):
        factored = scan._replace(factors=True)
        if _cost(state, _part(walk, cube), factored, mantissa) < (1 - _WORTH) * min(costs):
            scan = factored
        state.flag(_FACTORS, scan.factors)
    state.code(turned, scan, 0, mantissa)


def read_codes(state: CoderState, shape: tuple[int, ...], exponent: int, mantissa: int, repeats: bool = False) -> Array:
    """Inverse of `write_codes`."""
    if repeats and len(shape) > 1:
        places, distinct = [], 0
        for _ in range(shape[0]):
            places.append(min(state.number(), distinct))
            distinct = max(distinct, places[-1] + 1)
        return read_codes(state, (distinct, *shape[1:]), exponent, mantissa)[places]
    walk = Walk() if exponent else _of_shape(shape)
    rows, columns, kernel = _cube(shape)
    if not exponent and min(rows, columns) > 1:
        walk = _walk_in_stream(state, walk, len(shape))
    scan = walk.scan
    cube = np.zeros((columns, rows, kernel) if walk.transposed else (rows, columns, kernel), np.int32)
    matrix = cube.reshape(len(cube), -1)
    if not exponent and _has_factors(matrix.shape, mantissa):
        scan = scan._replace(factors=state.flag(_FACTORS))
    state.code(matrix, scan, exponent, mantissa)
    if walk.transposed:
        cube = np.ascontiguousarray(cube.transpose(1, 0, 2))
    return cube.reshape(shape)


def _cube(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(rows, columns, kernel): kernel is all that comes after two dimensions, a vector is one row."""
    return (shape[0], shape[1], math.prod(shape[2:])) if len(shape) > 1 else (1, math.prod(shape), 1)


def _of_shape(shape: tuple[int, ...]) -> Walk:
    """The plain walk: kernels of convolutions are known from the shape."""
    return Walk(scan=Scan(max(1, math.prod(shape[2:])), shape[-1] if len(shape) > 3 else 0))


def _walk_in_stream(state: CoderState, walk: Walk, dimensions: int) -> Walk:
    """Write or read it: the scan of matrices too."""
    transposed, (kernel, width, _) = state.number(int(walk.transposed)) > 0, walk.scan
    if dimensions == 2:
        kernel, width = state.number(kernel - 1) + 1, state.number(width)
    return Walk(transposed, Scan(kernel, width))


def _walks(matrix: Array) -> list[Walk]:
    """The ways to walk a matrix [rows, columns, 1] that are worth a try, the plain one first."""
    walks = []
    for transposed in (False, True):
        width = vertical(_part(Walk(transposed), matrix))
        scans = [Scan(), Scan(1, width), Scan(width * width, width)] if width else [Scan()]
        walks += [Walk(transposed, scan) for scan in scans]
    return walks


def _part(walk: Walk, cube: Array) -> Array:
    """The first rows of the turned matrix, as many as factors can be learned from."""
    rows = max(2 * RANK, _SAMPLE * cube.shape[walk.transposed] // cube.size)
    return walk.turn(cube[:, :rows] if walk.transposed else cube[:rows])


def _cost(state: CoderState, part: Array, scan: Scan, mantissa: int) -> float:
    """Bytes a code."""
    ahead = state.copy()
    ahead.code(part, scan, 0, mantissa)
    return (ahead.spent - state.spent) / part.size


def _has_factors(shape: tuple[int, ...], mantissa: int) -> bool:
    """Whether factors of rows and columns are worth a try: they take as much memory as `RANK` rows."""
    return min(shape) >= RANK and mantissa <= 8


def vertical(matrix: Array) -> int:
    """The distance in columns, 2 or more, at which codes of a row resemble each other most; 0 if none.

    A layer that reads a flattened image resembles itself at the width of the image: the largest
    autocorrelation of the rows (by the Wiener-Khinchin theorem), when it is beyond chance.
    """
    columns = matrix.shape[1]
    longest = min(columns // 2, _LONGEST)
    if longest < 2 or not matrix.any():
        return 0
    spectrum = np.fft.rfft(matrix.astype(np.float64), 2 * columns, axis=1)
    correlation = np.fft.irfft((np.abs(spectrum) ** 2).sum(0))[: longest + 1]
    share = correlation[2:] / correlation[0]
    best = int(share.argmax())
    return best + 2 if share[best] > 0.02 + 4 / math.sqrt(matrix.size) else 0
