"""Give a module tensors of other shapes and keep it consistent.

The one place that knows which attributes of torch's layers follow from the shapes of their tensors.
Channel pruning leaves smaller tensors behind; whoever rebuilds such a model from a file needs no
dependency graph, only the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autocompress.errors import ArtifactError

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_NORM = nn.modules.batchnorm._NormBase
_NO_LAYERS = {"torch.nn.modules.module", "torch.nn.modules.container"}


def _conv(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, _CONV)
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
    if isinstance(layer, _TRANSPOSED):
        layer.in_channels, layer.out_channels = shape[0], shape[1] * layer.groups
    elif depthwise:
        layer.in_channels = layer.out_channels = layer.groups = shape[0]
    else:
        layer.in_channels, layer.out_channels = shape[1] * layer.groups, shape[0]


def _linear(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, nn.Linear)
    layer.out_features, layer.in_features = shape


def _embedding(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, nn.Embedding)
    layer.num_embeddings, layer.embedding_dim = shape


def _norm(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, _NORM)
    layer.num_features = shape[0]


def _layer_norm(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    layer.normalized_shape = shape


def _group_norm(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, nn.GroupNorm)
    if shape[0] % layer.num_groups:
        raise ArtifactError(f"{shape[0]} channels are no multiple of the {layer.num_groups} groups of a GroupNorm")
    layer.num_channels = shape[0]


def _prelu(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert isinstance(layer, nn.PReLU)
    layer.num_parameters = shape[0]


_RESIZE: tuple[tuple[type[nn.Module], Callable[[nn.Module, tuple[int, ...]], None]], ...] = (
    (_CONV, _conv),
    (nn.Linear, _linear),
    (nn.Embedding, _embedding),
    (_NORM, _norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
)


def resizable(layer: nn.Module) -> bool:
    """Whether this kind of layer can take tensors with another number of channels.

    Grouped convolutions can only when they are depthwise with one filter a channel. What is no layer of torch's is
    thought to compute with the tensors that it has: that is tried before its channels are pruned.
    """
    if isinstance(layer, _CONV) and layer.groups > 1:
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        return depthwise and not isinstance(layer, _TRANSPOSED)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and not layer.elementwise_affine:
        return False  # no tensor of it shows its size
    torchs = {kind.__module__ for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.")}
    return isinstance(layer, tuple(kind for kind, _ in _RESIZE)) or torchs <= _NO_LAYERS


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, [..., 2], in the same memory; anything else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """First name of each parameter or persistent buffer -> all places that hold it (tied ones too)."""
    first: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        held: list[tuple[str, Tensor | None]] = [*module._parameters.items()]
        held += [(k, v) for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set]
        for name, tensor in held:
            if tensor is None:
                continue
            key = first.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
            if all(module is not other or name != known for other, known in places.get(key, ())):
                places.setdefault(key, []).append((module, name))
    return places


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, by its first name, detached, complex ones as pairs."""
    return {key: as_real(getattr(*places[0]).detach()) for key, places in owners(model).items()}


@torch.no_grad()
def assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `values` (as from `tensors`) into `model`, resizing layers whose tensors are larger.

    Raises ArtifactError naming the first tensor that is missing, unknown or of an impossible shape.
    """
    places = owners(model)
    for key in values.keys() - places.keys():
        raise ArtifactError(f"tensor {key!r} is not in the model: it was made for another architecture")
    for key in places.keys() - values.keys():
        raise ArtifactError(f"tensor {key!r} of the model is not in the file: it was made for another architecture")
    resized: dict[nn.Module, None] = {}
    for key, value in values.items():
        old = getattr(*places[key][0])
        if old.is_complex() and not value.is_complex() and value.shape[-1:] == (2,):
            value = torch.view_as_complex(value.contiguous())
        if old.shape == value.shape:
            old.copy_(value)
            continue
        smaller = old.ndim == value.ndim and all(new <= was for new, was in zip(value.shape, old.shape, strict=True))
        if not smaller or not all(resizable(module) for module, _ in places[key]):
            raise ArtifactError(f"tensor {key!r}: expected shape {tuple(old.shape)}, the file has {tuple(value.shape)}")
        fresh = value.detach().to(old.device, old.dtype).clone()
        new = nn.Parameter(fresh, old.requires_grad) if isinstance(old, nn.Parameter) else fresh
        for module, name in places[key]:
            setattr(module, name, new)
            resized[module] = None
    for module in resized:
        update_attributes(module)


def update_attributes(module: nn.Module) -> None:
    """The attributes of one of torch's layers follow the shapes of its tensors."""
    shape = max((tuple(t.shape) for t in (*module.parameters(False), *module.buffers(False))), key=len)
    for kind, resize in _RESIZE:
        if isinstance(module, kind):
            resize(module, shape)
            break
