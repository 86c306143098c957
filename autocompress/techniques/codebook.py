"""Weight sharing: every weight of a layer is one of k learned values, zero among them.

Deep Compression (Han et al., ICLR 2016): k-means finds the values, fine-tuning moves them by the summed
gradients of the weights that share them, and the file holds places in the book, entropy coded. Places
are counted from zero outwards, so that the coder sees them as it sees integers.

Not for tensors of fewer than 16 weights: the book would be larger than what it saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.recipe import Choice
from autocompress.techniques.base import Coded, IntegerCoding, register, straight_through

_SIZES = (256, 128, 64, 32, 16, 8, 4)
_SAMPLE = 16384


class Codebook(IntegerCoding):
    """Learned parameters: the k - 1 values that are not zero, kept as bfloat16 in the file."""

    tag = 3

    def choices(self) -> Sequence[Choice]:
        return tuple(f"codebook-{size}" for size in _SIZES)

    def bits(self, choice: Choice) -> float:
        return float(np.log2(_size(choice)))

    def layout(self, choice: Choice) -> tuple[int, int]:
        return 0, int(self.bits(choice))

    def parameters(self, choice: Choice, shape: tuple[int, ...]) -> int:
        return _size(choice) - 1

    def initial(self, weight: Tensor, choice: Choice, clipping: str = "mse") -> Tensor:
        """k-means in one dimension (Lloyd, 1957) with one mean held at zero, from evenly spaced quantiles."""
        kept = weight.detach().float().flatten()
        kept = kept[kept != 0].sort().values
        count = _size(choice) - 1
        if not len(kept):
            return torch.linspace(-1, 1, count, device=weight.device)
        kept = kept[:: len(kept) // _SAMPLE + 1].contiguous()
        book = _book(kept[((torch.arange(count, device=kept.device) + 0.5) / count * len(kept)).long()])
        for _ in range(20):
            place = torch.bucketize(kept, (book[1:] + book[:-1]) / 2)
            members = torch.bincount(place, minlength=len(book))
            sums = torch.zeros_like(book).index_add_(0, place, kept)
            means = torch.where(members > 0, sums / members, book)
            means[_zero(book)] = 0
            book = means.sort().values
        return _without_zero(book)

    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        """Gradients reach the weight straight through, and the shared value as a sum."""
        book = _book(parameters)
        place = _nearest(weight.detach(), book.detach())
        return book[place] + (weight - weight.detach())

    def scaled(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        """Places, linear between the values of the book."""
        book = _book(parameters.detach())
        below = torch.bucketize(weight.detach().contiguous(), book, right=True).sub_(1).clamp_(0, len(book) - 2)
        width = (book[below + 1] - book[below]).clamp_min(1e-12)
        return (below - _zero(book) + (weight - book[below]) / width).clamp(-_zero(book), len(book) - 1 - _zero(book))

    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        book = _book(parameters.detach())
        codes = _nearest(weight.detach(), book) - _zero(book)
        return Coded(codes.to(torch.int32).cpu().numpy(), tuple(_without_zero(book).tolist()))

    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        book = _book(torch.tensor(coded.parameters, dtype=torch.float32))
        places = torch.from_numpy(coded.codes).long() + _zero(book)
        return book[places.clamp_(0, len(book) - 1)]


def _size(choice: Choice) -> int:
    return int(str(choice).rpartition("-")[2])


def _book(parameters: Tensor) -> Tensor:
    """All values, ascending, zero among them; differentiable, as the file keeps them."""
    kept = straight_through(parameters.detach().bfloat16().float(), parameters)
    return torch.cat([kept, kept.new_zeros(1)]).sort(stable=True).values


def _zero(book: Tensor) -> int:
    """Place of a zero."""
    return int((book < 0).sum())


def _without_zero(book: Tensor) -> Tensor:
    return torch.cat([book[: _zero(book)], book[_zero(book) + 1 :]])


def _nearest(weight: Tensor, book: Tensor) -> Tensor:
    places = torch.bucketize(weight.contiguous(), (book[1:] + book[:-1]) / 2)
    return torch.where(weight == 0, _zero(book), places)


register(Codebook())
