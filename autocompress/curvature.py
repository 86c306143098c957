"""How much outputs of a model move with its weights: a diagonal of the Gauss-Newton matrix, by random projections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autocompress.divergence import projection
from autocompress.task import Batch, Task


def squared_gradients(
    task: Task, model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Name -> float32, shape of the weight: squares of the derivatives of the outputs of `model`, all outputs and
    batches together. weights: some of its parameters. All alike for a model that cannot be differentiated."""
    if not weights:
        return {}
    generator, ones = torch.Generator().manual_seed(0), {name: torch.ones_like(w) for name, w in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    squares = {name: torch.zeros_like(one) for name, one in ones.items()}
    try:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # whose RNNs want to be in training
            for batch in batches:
                projected = projection(*task.run(model, batch), generator)
                found = torch.autograd.grad(projected, [*weights.values()], allow_unused=True)
                for square, gradient in zip(squares.values(), found, strict=True):
                    if gradient is not None:
                        square += gradient.float().square()
    except RuntimeError:
        return ones
    return squares
