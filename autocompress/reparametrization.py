"""Weights that are computed from others, or kept in another order, made plain ones; and modules plain ones.

What runs is what is compressed: torch's parametrizations (weight_norm, spectral_norm, orthogonal or one's own), the
older hooks of `weight_norm` and `spectral_norm`, and the masks of `torch.nn.utils.prune` give way to the weights that
they make; `Conv1D` of transformers (GPT-2), a linear layer whose matrix is transposed, becomes an `nn.Linear`. What
`torch.compile` has wrapped is unwrapped: it would compile anew for every shape of a layer. `nn.TransformerEncoder`
does not compute past its modules any more, which in evaluation it does as if they were those it was made with.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autocompress.errors import TaskError, in_words


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
    conv1d = {m: _linear(m) for m in model.modules() if type(m).__name__ == "Conv1D" and hasattr(m, "nf")}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in conv1d:
                setattr(parent, name, conv1d[child])
    return model


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


def _linear(conv1d: nn.Module) -> nn.Linear:
    """The layer that does the same."""
    weight, bias = conv1d.weight, conv1d.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad), bias
    return made.train(conv1d.training)


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
