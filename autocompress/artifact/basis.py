"""The weights of a layer in another basis, for the grids that each row of them lies on: images, signals or kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.techniques.base import Transform

_LINE = 64
"""Places that are transformed together: longer sides are cut."""


@dataclass(frozen=True)
class Basis:
    """A transform of one tensor. width: columns of the image that each row of a matrix lies on; 0 for kernels, which
    are the dimensions of a tensor after the second."""

    transform: Transform
    width: int = 0

    def analysed(self, weight: Tensor) -> Tensor:
        """The coefficients of float weights, in the same shape; or of their gradient, as the basis is orthonormal."""
        return self._turned(weight, forward=True)

    def synthesised(self, coefficients: Tensor) -> Tensor:
        """Inverse of `analysed`; differentiable."""
        return self._turned(coefficients, forward=False)

    def read(self, coefficients: Tensor) -> Tensor:
        """The weights, float32, as every reader of a file gets them, in whatever order it adds: by whole numbers, of
        which 2^25 are more than any coefficient, rounded half to even after each dimension."""
        unit = 2.0 ** (int(torch.frexp(coefficients.abs().max()).exponent) - 25)
        return (self._turned((coefficients.double() / unit).round(), False, whole=True) * unit).float()

    def _turned(self, values: Tensor, forward: bool, whole: bool = False) -> Tensor:
        sides = (values.shape[1] // self.width, self.width) if values.ndim == 2 else tuple(values.shape[2:])
        grids = values.reshape(-1, *sides)
        if math.prod(sides) <= _LINE and not whole:  # one product takes a fifth of the time
            matrix = _matrix(self.transform, sides, values.dtype, values.device)
            return (grids.flatten(1) @ (matrix.T if forward else matrix)).reshape(values.shape)
        for side in [side for side, places in enumerate(sides, 1) if places > 1]:
            turned = []
            for line in torch.split(grids.transpose(side, -1), _LINE, -1):
                matrix = _matrix(self.transform, line.shape[-1:], values.dtype, values.device)
                turned.append(line @ (matrix.T if forward else matrix))
            grids = torch.cat(turned, -1).transpose(side, -1)
            grids = grids.round() if whole else grids
        return grids.reshape(values.shape)


@functools.cache
def _matrix(transform: Transform, sides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[places, places]: a row for each coefficient of a whole grid of these sides."""
    return functools.reduce(torch.kron, map(transform.matrix, sides)).to(device, dtype)
