"""Models to artifacts and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.artifact.container import (
    Artifact,
    Plan,
    decode_artifact,
    encode_artifact,
    read_artifact,
)
from autocompress.errors import ArtifactError
from autocompress.model.reparametrization import copied, plain
from autocompress.model.surgery import assign, tensors
from autocompress.recipe import MODEL, Recipe
from autocompress.techniques.base import coding_of, structures

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SMALL = 8
"""Shorter tensors stay float32 where their codes would need a step of their own: it costs as much as it saves."""


@dataclass(frozen=True)
class Weights:
    """What fine-tuning leaves behind: a model whose tensors are float32, and how to store its layers.

    layers: name of a weight -> its plan, with pruned weights at zero.
    """

    model: nn.Module
    layers: Mapping[str, Plan] = field(default_factory=dict)


def fold_norms(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of `model` with every batch norm reduced to scale and shift, its statistics left out.

    In evaluation mode (x - mean) / sqrt(var + eps) * weight + bias has two degrees of freedom a channel,
    not four; the file implies mean 0 and variance 1 (see `with_statistics`).
    """
    folded = tensors(model)
    for prefix, module in _norms(model):
        mean, var = module.running_mean, module.running_var
        names = [prefix + name for name in ("weight", "bias")]
        if mean is None or var is None or not all(name in folded for name in names):
            continue
        weight, bias = (folded[name] for name in names)
        # a channel that never changes needs no scale, and the huge one it has would ruin the coding
        scale = torch.where(var > 1e-3 * module.eps, weight / (var + module.eps).sqrt(), 0.0)
        folded[names[0]], folded[names[1]] = scale * math.sqrt(1 + module.eps), bias - mean * scale
        for name in _STATISTICS:
            folded.pop(prefix + name, None)
    return folded


def unfold_norms(model: nn.Module, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `fold_norms`: `folded` values, rounded perhaps, on the statistics that `model` has."""
    whole = dict(folded)
    for prefix, module in _norms(model):
        mean, var = module.running_mean, module.running_var
        names = [prefix + name for name in ("weight", "bias")]
        if mean is None or var is None or prefix + "running_mean" in folded:
            continue
        scale = folded[names[0]] / math.sqrt(1 + module.eps)
        whole[names[0]], whole[names[1]] = scale * (var + module.eps).sqrt(), folded[names[1]] + mean * scale
        own = tensors(module)
        whole |= {prefix + name: own[name] for name in _STATISTICS if name in own}
    return whole


def with_statistics(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` with the neutral statistics of every batch norm of `model` that has none in there."""
    whole = dict(values)
    for prefix, module in _norms(model):
        scale = values.get(prefix + "weight")
        if module.running_mean is not None and scale is not None:
            fresh = (torch.zeros_like(scale), torch.ones_like(scale), torch.zeros((), dtype=torch.int64))
            for name, value in zip(_STATISTICS, fresh, strict=True):
                whole.setdefault(prefix + name, value)
    return whole


def _norms(model: nn.Module) -> list[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    return [
        (f"{prefix}." if prefix else "", module)
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def plans(weights: Weights, recipe: Recipe) -> dict[str, Plan]:
    """How each tensor of a compressed model is stored: layers by their own plan, the rest by `vectors`."""
    vectors = recipe.get(MODEL, "vectors", "float32")
    assert vectors is not None
    coding, out = coding_of(vectors), {}
    for name, value in fold_norms(weights.model).items():
        least = _SMALL if coding.parameters(vectors, tuple(value.shape)) else 2  # one number is stored as it is
        if name in weights.layers:
            out[name] = weights.layers[name]
        elif value.is_floating_point() and value.numel() >= least:
            out[name] = Plan(value, vectors, coding.initial(value, vectors))
        else:
            out[name] = Plan(value, "float32")
    return out


def pack(weights: Weights, recipe: Recipe) -> bytes:
    """The bytes of the artifact; `unpack` gives back exactly what the techniques simulate.

    Of the recipe the file holds what decoding needs; formats, zeros and shapes are in the tensors.
    """
    needed = {name for name, structure in structures().items() if structure.restores}
    return encode_artifact(plans(weights, recipe), recipe.only(needed))


def unpack(artifact: Artifact | bytes, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A module in evaluation mode with the structure and the tensors of `artifact`.

    model: the architecture, as an instance (copied, not changed) or as a function that builds it; its
    own weights do not matter. Raises ArtifactError when the two do not fit.
    """
    if isinstance(artifact, bytes):
        artifact = decode_artifact(artifact)
    fresh = plain(copied(model) if isinstance(model, nn.Module) else model())
    for name, structure in structures().items():
        try:
            fresh = structure.restore(fresh, artifact.recipe.dimension(name))
        except AttributeError as error:
            raise ArtifactError(f"the model has no part as in the file ({error}): another architecture") from error
    assign(fresh, with_statistics(fresh, {name: tensor.value for name, tensor in artifact.tensors.items()}))
    return fresh.eval()


def load(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The compressed model of a `.acz` file as a plain module, smaller and ready to run.

    model: the architecture, as an instance (copied, not changed) or as a function that builds it; its
    weights do not matter. Batch norms come back folded: fine for inference, not for training on.
    Raises ArtifactError when the file cannot be read or does not fit the model.
    """
    return unpack(read_artifact(path), model)
