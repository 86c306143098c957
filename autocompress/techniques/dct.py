"""Transform coding: a layer's weights are pruned, quantised and stored as coefficients of a cosine transform.

What reads a picture or a signal, and the kernel of a convolution, resembles itself from one place to the next, so few
of its coefficients matter (Ahmed et al., Discrete Cosine Transform, 1974; Wang et al., CNNpack, NeurIPS 2016; Chen et
al., Compressing Convolutional Neural Networks in the Frequency Domain, KDD 2016). Sides of up to 7 places are
transformed whole, longer ones in blocks of 4, and of each 64 places the lowest frequencies of all blocks come first.
The basis is orthonormal. A decoded model has plain weights again.

Not for layers whose inputs are in no order (what a linear layer is given must correlate with its neighbours), and
tasks of no epochs.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from autocompress.techniques.base import Transform, register

_WHOLE, _BLOCK, _PIECE = 7, 4, 64
"""Places of the longest side that is one block, of a block of others, and of what is ordered together."""


class Dct(Transform):
    choice = "dct"
    tag = 0

    def analyse(self, pictures: Tensor) -> Tensor:
        return _turned(pictures, forward=True)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        return _turned(coefficients, forward=False)


def _turned(values: Tensor, forward: bool) -> Tensor:
    sides = tuple(values.shape[1:])
    if values.dtype == torch.float32 and math.prod(sides) <= _PIECE:  # kernels: one product takes a fifth of the time
        basis = _basis_of_all(sides, values.device)
        return (values.flatten(1) @ (basis.T if forward else basis)).view_as(values)
    for side in range(1, values.ndim):
        if values.shape[side] > 1:
            turned = []
            for piece in torch.split(values.transpose(side, -1), _PIECE, -1):
                basis = _basis(piece.shape[-1], values.dtype, values.device)
                turned.append(piece @ (basis.T if forward else basis))
            values = torch.cat(turned, -1).transpose(side, -1)
            values = values.round() if values.dtype == torch.float64 else values
    return values


@functools.cache
def _basis(places: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[places, places]: a row for each coefficient."""
    size = places if places <= _WHOLE else _BLOCK
    rows = []
    for start in range(0, places, size):
        waves = _waves(min(size, places - start))
        rows += list(enumerate(nn.functional.pad(waves, (start, places - start - len(waves)))))
    return torch.stack([row for _, row in sorted(rows, key=lambda row: row[0])]).to(device, dtype)


@functools.cache
def _basis_of_all(sides: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [places, places] of a whole picture."""
    return functools.reduce(torch.kron, [_basis(side, torch.float32, device) for side in sides])


def _waves(size: int) -> Tensor:
    """float64 [size, size]: the orthonormal cosine transform of type II, in multiples of 2^-23."""
    places = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (places + 0.5) * places[:, None]) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return (waves * 2**23).round() / 2**23


register(Dct())
