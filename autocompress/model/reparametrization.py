"""Weights that are computed from others, or kept in another order, made plain ones; and modules plain ones.

What runs is what is compressed: torch's parametrizations (weight_norm, spectral_norm, orthogonal or one's own), the
older hooks of `weight_norm` and `spectral_norm`, and the masks of `torch.nn.utils.prune` give way to the weights that
they make; `Conv1D` of transformers (GPT-2), a linear layer whose matrix is transposed, becomes an `nn.Linear`, and
`nn.MultiheadAttention`, which keeps three matrices in one tensor, an `Attention` of four layers. What `torch.compile`
has wrapped is unwrapped: it would compile anew for every shape of a layer. `nn.TransformerEncoder` does not compute
past its modules any more, which in evaluation it does as if they were those it was made with.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autocompress.errors import TaskError, in_words
from autocompress.model.attention import Attention, linear
from autocompress.model.surgery import owners


@torch.enable_grad()
def plain(model: nn.Module) -> nn.Module:
    """`model`, changed in place, or what was compiled, whose tensors are all as they are used in evaluation."""
    model = _uncompiled(model).eval()
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
    shared = {m for places in owners(model).values() if len({m for m, _ in places}) > 1 for m, _ in places}
    made = {m: _of_linear_layers(m) for m in model.modules() if shared.isdisjoint(m.modules())}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and made.get(child):
                setattr(parent, name, made[child])
    return made.get(model) or model


def _of_linear_layers(module: Any) -> nn.Module | None:
    """What does the same, of modules that could be linear layers or be made of them."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return linear(module.weight.t(), module.bias).train(module.training)
    if type(module).forward is nn.MultiheadAttention.forward and module.bias_k is None and not module.add_zero_attn:
        return Attention(module)
    return None


def _uncompiled(model: nn.Module) -> nn.Module:
    own: nn.Module = getattr(model, "_orig_mod", model)
    for module in own.modules():
        module._compiled_call_impl = None
        for name, child in module.named_children():
            setattr(module, name, getattr(child, "_orig_mod", child))
    return own


def _remove_parametrizations(module: nn.Module) -> None:
    """As `remove_parametrizations`, which would change the class of the module, and so its copies, too."""
    makers = module.parametrizations
    assert isinstance(makers, nn.ModuleDict)
    made = {name: getattr(module, name).detach().clone() for name in makers}
    learned = {name: [p.requires_grad for p in makers[name].parameters()] for name in made}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in made.items():
        if learned[name]:
            module.register_parameter(name, nn.Parameter(value, any(learned[name])))
        else:
            module.register_buffer(name, value)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a model keeps of its last forward pass, wherever, are copied without their past. Raises
    TaskError where there can be none."""
    try:
        with mock.patch.object(Tensor, "__deepcopy__", _without_past):
            return copy.deepcopy(model)
    except Exception as error:
        raise TaskError(
            f"the model cannot be copied ({in_words(error)}): what copy.deepcopy cannot do should be no attribute of it"
        ) from error


_deepcopy = Tensor.__deepcopy__


def _without_past(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    return _deepcopy(tensor, memo) if tensor.is_leaf else tensor.detach().clone()  # type: ignore[no-untyped-call]
