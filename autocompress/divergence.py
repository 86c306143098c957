"""How far the outputs of a model are from those of the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autocompress.nested import leaves


def divergence(student: Any, teacher: Any, target: Any = None, temperature: float = 1.0) -> Tensor:
    """How far outputs are from the original model's, a scalar tensor; the mean over the tensors in them.

    KL divergence of the outputs that hold a score for each class where targets are class indices (Hinton et al.,
    2015); if there are none, squared error of all outputs relative to the variance of the teacher's; 0 of outputs that
    are no tensors, or single numbers.
    """
    pairs = [*_pairs(student, teacher)]
    scores = [(s, t, d) for s, t in pairs if (d := class_dimension(s, target)) is not None]
    parts = [_kl(s / temperature, t / temperature, d) * temperature**2 for s, t, d in scores] or [
        torch.div((s - t).square().mean(), _spread(t)) for s, t in pairs
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def is_comparable(output: Any) -> bool:
    """Whether `divergence` has anything to look at."""
    return next(_outputs(output), None) is not None


def projection(output: Any, target: Any, generator: torch.Generator) -> Tensor:
    """The same outputs as `divergence` looks at, each relative to its deviation, times random numbers: a scalar tensor,
    the squares of whose derivatives are, on average, those of all outputs together (Hutchinson, 1990)."""
    every = [*_outputs(output)]
    scores = [y for y in every if class_dimension(y, target) is not None]
    drawn = [(y.float(), torch.randn(y.shape, generator=generator).to(y.device)) for y in scores or every]
    return sum((torch.div((y * u).sum(), _spread(y.detach()).sqrt()) for y, u in drawn), torch.zeros(()))


def class_dimension(output: Tensor, target: Any) -> int | None:
    """The dimension of an output that holds a score for each class; None when it does not, or when targets are not
    class indices.

    It is 1, as torch has it ([N, C, ...]), or the last one, where the target has as many indices as the output
    without it: language models give [N, T, C] for a target of [N, T] or [N * T].
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or output.ndim < 2:
        return None
    last = output.ndim - 1
    fits = [d for d in (1, last) if output.shape[:d] + output.shape[d + 1 :] == target.shape]
    flat = [d for d in (last, 1) if output.numel() == target.numel() * output.shape[d]]
    found = [d for d in fits + flat if output.shape[d] > 1]
    return found[0] if found else None


def _spread(teacher: Tensor) -> Tensor:
    """The variance, as far as so many numbers tell it: of two that are nearly alike it would be nearly nothing."""
    doubt = (2 / teacher.numel()) ** 3
    return (teacher.var() + doubt * teacher.square().mean()).clamp_min(1e-6)


def _kl(student: Tensor, teacher: Tensor, classes: int) -> Tensor:
    p, q = teacher.log_softmax(classes), student.log_softmax(classes)
    return (p.exp() * (p - q)).sum(classes).mean()


def _pairs(student: Any, teacher: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """float32, outputs of one shape, in their order: a model may give more of them while it is trained."""
    own = [*_outputs(student)]
    for other in _outputs(teacher):
        at = next((i for i, output in enumerate(own) if output.shape == other.shape), None)
        if at is not None:
            yield own.pop(at).float(), other.float()


def _outputs(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors but single numbers, such as a loss among the outputs, and empty ones."""
    for leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 1:
            yield leaf
