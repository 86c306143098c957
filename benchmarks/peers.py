"""What others make of the same tensors: bytes of a tensor of codes by each peer.

Peers that are not installed are left out of the tables. NNCodec (ISO/IEC 15938-17, DeepCABAC) needs a
C++ compiler: `pip install pybind11 setuptools && pip install --no-deps --no-build-isolation nncodec`;
zstd: `pip install zstandard`.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import nncodec.extensions.deepCABAC as cabac  # noqa: N813
except ImportError:
    cabac = None
try:
    import zstandard
except ImportError:
    zstandard = None

Array = np.ndarray[Any, np.dtype[Any]]
Layout = tuple[int, int]
"""(exponent, mantissa) bits, as `Coding.layout` gives them."""


def packed(codes: Array, layout: Layout) -> bytes:
    """Every code in as many bits as its format has, without gaps."""
    bits = 1 + sum(layout)
    values = codes.reshape(-1).astype(np.int64) & ((1 << bits) - 1)
    planes = (values[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.astype(np.uint8)).tobytes()


def nncodec_bytes(codes: Array, layout: Layout) -> int:
    """NNCodec's DeepCABAC with its parameter optimisation, at its best of five scan orders with and
    without row skipping. Of floats it codes the bit patterns, or they are packed if that is smaller."""
    if layout[0]:
        bits = 1 + sum(layout)
        plain = len(packed(codes, layout))
        return min(plain, _cabac(codes.astype(np.int64) & ((1 << bits) - 1))) if bits < 31 else plain
    return _cabac(codes)


def _cabac(codes: Array) -> int:
    matrix = np.ascontiguousarray(codes if codes.ndim > 1 else codes.reshape(1, -1), np.int32)
    empty = np.array([int(not row.any()) for row in matrix], np.int32)
    off = (cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8))
    sizes = []
    for order in range(5):
        for skip in (0, 1):
            encoder = cabac.Encoder()
            encoder.initCtxModels(10, 1)
            encoder.encodeLayer(matrix, 0, order, 1, 0, skip, empty, *off, 0, 0)
            sizes.append(len(encoder.finish()))
    return min(sizes)


def zstd(codes: Array, layout: Layout) -> int:
    """The better of levels 19 and 22 on packed bits."""
    data = packed(codes, layout)
    return min(len(zstandard.ZstdCompressor(level=level).compress(data)) for level in (19, 22))


def xz(codes: Array, layout: Layout) -> int:
    """xz -9e on packed bits."""
    return len(lzma.compress(packed(codes, layout), preset=9 | lzma.PRESET_EXTREME))


def zero_order(codes: Array, layout: Layout) -> int:
    """Entropy of the codes as independent draws, without any table: no coder of one context is below it."""
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    return round(float(-(counts * np.log2(share)).sum()) / 8)


def float16(codes: Array, layout: Layout) -> int:
    """Two bytes a weight, as safetensors stores them (its header is not counted)."""
    return 2 * int(codes.size)


def peers() -> dict[str, Callable[[Array, Layout], int]]:
    """The peers that can run here, by name."""
    everyone: dict[str, Callable[[Array, Layout], int] | None] = {
        "NNCodec": nncodec_bytes if cabac else None,
        "zstd": zstd if zstandard else None,
        "xz": xz,
        "zero-order": zero_order,
        "float16": float16,
    }
    return {name: peer for name, peer in everyone.items() if peer is not None}
