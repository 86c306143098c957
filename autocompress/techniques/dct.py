"""Transform coding: a layer's weights are pruned, quantised and stored as coefficients of a cosine transform.

What reads an image or a signal, and the kernel of a convolution, resembles itself from one place to the next, so few
of its coefficients matter (Ahmed et al., Discrete Cosine Transform, 1974; Wang et al., CNNpack, NeurIPS 2016; Chen et
al., Compressing Convolutional Neural Networks in the Frequency Domain, KDD 2016). Sides of up to 7 places are
transformed whole, longer ones in blocks of 4, and of each 64 places the lowest frequencies of all blocks come first.
The basis is orthonormal. A decoded model has plain weights again.

Not for layers whose inputs are in no order: what a linear layer is given must correlate with its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocompress.techniques.base import Transform, register

_WHOLE, _BLOCK = 7, 4
"""Places of the longest line that is one block, and of a block of others."""


class Dct(Transform):
    choice = "dct"
    tag = 0

    def matrix(self, places: int) -> Tensor:
        size = places if places <= _WHOLE else _BLOCK
        rows = []
        for start in range(0, places, size):
            waves = _waves(min(size, places - start))
            rows += list(enumerate(nn.functional.pad(waves, (start, places - start - len(waves)))))
        return torch.stack([row for _, row in sorted(rows, key=lambda row: row[0])])


def _waves(size: int) -> Tensor:
    """float64 [size, size]: the orthonormal cosine transform of type II."""
    places = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (places + 0.5) * places[:, None]) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return (waves * 2**23).round() / 2**23


register(Dct())
