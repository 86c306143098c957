"""How far the outputs of a model are from those of the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def divergence(student: Any, teacher: Any, target: Any = None, temperature: float = 1.0) -> Tensor:
    """How far outputs are from the original model's, a scalar tensor.

    KL divergence over the classes where targets are class indices (Hinton et al., 2015), else squared
    error relative to the variance of the teacher's output. Tuples, lists and dicts are averaged.
    """
    if isinstance(student, Tensor):
        if not student.is_floating_point() or not student.ndim:  # a loss, among the outputs, is no output
            return torch.zeros(())
        student, teacher = student.float(), teacher.float()
        classes = class_dimension(student, target)
        if classes is not None:
            p = (teacher / temperature).log_softmax(classes)
            q = (student / temperature).log_softmax(classes)
            return torch.mul((p.exp() * (p - q)).sum(classes).mean(), temperature**2)
        return torch.div((student - teacher).square().mean(), teacher.var().clamp_min(1e-6))
    if isinstance(student, Mapping):
        pairs = [(student[key], teacher[key]) for key in student]
    elif isinstance(student, (tuple, list)):
        pairs = list(zip(student, teacher, strict=True))
    else:
        return torch.zeros(())
    parts = [divergence(s, t, target, temperature) for s, t in pairs if isinstance(s, (Tensor, tuple, list, Mapping))]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def class_dimension(output: Tensor, target: Any) -> int | None:
    """The dimension of an output that holds a score for each class; None when targets are not class indices.

    It is 1, as torch has it ([N, C, ...]), or the last one where the target has as many indices as the output
    without it: language models give [N, T, C] for a target of [N, T] or [N * T].
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or output.ndim < 2:
        return None
    last = output.ndim - 1
    fits = [d for d in (1, last) if output.shape[:d] + output.shape[d + 1 :] == target.shape]
    flat = [d for d in (last, 1) if output.numel() == target.numel() * output.shape[d]]
    found = [*fits, *flat, 1][0]
    return found if output.shape[found] > 1 else None
