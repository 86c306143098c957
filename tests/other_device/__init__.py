"""A device of its own, without any: `torch.device(DEVICE)` once `register()` was called, which compiles device.cpp.

What is left on the CPU, or takes random numbers from there, fails as it would on a GPU. What is computed is what
the CPU would have computed.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration, cpp_extension

DEVICE = "npu"
"""A name that safetensors knows."""
_SOURCE = Path(__file__).with_name("device.cpp")


def register() -> None:
    """For the rest of this process. Raises RuntimeError where there is no compiler."""
    device = cpp_extension.load("other_device", str(_SOURCE), extra_cflags=["-O1"])
    backend_registration.rename_privateuse1_backend(DEVICE)
    module: Any = types.ModuleType(f"torch.{DEVICE}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.manual_seed = module.manual_seed_all = device.seed
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(DEVICE, module)
    device.register_hooks()
    backend_registration.generate_methods_for_privateuse1_backend()
    # or the copies of a tensor that several modules share would be several
    torch.__future__.set_swap_module_params_on_conversion(True)
    for name, kernel in _KERNELS.items():
        _LIBRARY.impl(name, kernel, "PrivateUse1")


def _lstm(given: Tensor, kept: Tensor, cell: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    into, forget, new, out = sum((given, kept, *biases)).chunk(4, 1)
    into, forget, new, out = into.sigmoid(), forget.sigmoid(), new.tanh(), out.sigmoid()
    after = forget * cell + into * new
    return out * after.tanh(), after, torch.cat([into, forget, new, out], 1)


def _lstm_backward(
    of_hidden: Tensor | None, of_cell: Tensor | None, cell: Tensor, after: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    into, forget, new, out = gates.chunk(4, 1)
    hidden = torch.zeros_like(after) if of_hidden is None else of_hidden
    inner = hidden * out * (1 - after.tanh() ** 2) + (0 if of_cell is None else of_cell)
    each = [inner * new * into * (1 - into), inner * cell * forget * (1 - forget), inner * into * (1 - new**2)]
    of_gates = torch.cat([*each, hidden * after.tanh() * out * (1 - out)], 1)
    return of_gates, inner * forget, of_gates.sum(0) if has_bias else None


def _gru(given: Tensor, kept: Tensor, hidden: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
    if biases:
        given, kept = given + biases[0], kept + biases[1]
    (reset, update, new), (of_reset, of_update, of_new) = given.chunk(3, 1), kept.chunk(3, 1)
    reset, update = (reset + of_reset).sigmoid(), (update + of_update).sigmoid()
    new = (new + reset * of_new).tanh()
    return new + update * (hidden - new), torch.cat([reset, update, new, hidden, of_new], 1)


def _gru_backward(of_hidden: Tensor, known: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    reset, update, new, hidden, of_new = known.chunk(5, 1)
    inner = of_hidden * (1 - update) * (1 - new**2)
    gates = [inner * of_new * reset * (1 - reset), of_hidden * (hidden - new) * update * (1 - update)]
    given, kept = torch.cat([*gates, inner], 1), torch.cat([*gates, inner * reset], 1)
    return given, kept, of_hidden * update, *((given.sum(0), kept.sum(0)) if has_bias else (None, None))


_KERNELS = {
    "_thnn_fused_lstm_cell": _lstm,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_backward,
    "_thnn_fused_gru_cell": _gru,
    "_thnn_fused_gru_cell_backward": _gru_backward,
}
"""Which the CPU has none of."""
_LIBRARY = torch.library.Library("aten", "IMPL")
