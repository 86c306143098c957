"""How much outputs of a model move with its weights: a diagonal of the Gauss-Newton matrix, by random projections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autocompress.divergence import projection
from autocompress.task import Batch, Task, batch_size


def squared_gradients(
    task: Task, model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Name -> float32, shape of the weight: squares of the derivatives of the outputs of `model`, all outputs
    together, in the mean of the samples. weights: some of its parameters. Empty for a model that cannot be
    differentiated."""
    if not weights:
        return {}
    generator, count = torch.Generator().manual_seed(0), 0
    for weight in weights.values():
        weight.requires_grad_()
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # whose RNNs want to be in training
            for batch in batches:
                count += batch_size(batch)
                projected = projection(*task.run(model, batch), generator)
                found = torch.autograd.grad(projected, [*weights.values()], allow_unused=True)
                for square, gradient in zip(squares.values(), found, strict=True):
                    if gradient is not None:
                        square += gradient.float().square()
    except RuntimeError:
        return {}
    return {name: square / max(1, count) for name, square in squares.items()}
