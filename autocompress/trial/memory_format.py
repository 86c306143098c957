"""Convolutions with channels last in memory, which takes a quarter of their time away."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from autocompress.metric import score
from autocompress.model.reparametrization import copied
from autocompress.task import Calibration, device_of, to_device

_VECTOR = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
"""float32 numbers that the CPU computes with at once."""


def put_channels_last(model: nn.Module, calibration: Calibration) -> None:
    """Unless the model, the loss or the metric cannot do with what comes out of them then (`view`)."""
    if _is_risky(model) or not any(isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) for module in model.modules()):
        return
    calibration, tried = calibration.shortened(model), copied(model)
    convert_conv2d_weight_memory_format(tried, torch.channels_last)
    with suppress(Exception):  # whatever a user's own code makes of it
        torch.autograd.backward(calibration.loss(tried.train()))
        with torch.no_grad():
            score(to_device(calibration.task.metric, device_of(tried)), [(*calibration.run(tried.eval()), 1)])
        convert_conv2d_weight_memory_format(model, torch.channels_last)


def mend_memory_format(model: nn.Module) -> None:
    """Channels first again, where a model has become so narrow that channels last end the process."""
    if _is_risky(model):
        convert_conv2d_weight_memory_format(model, torch.contiguous_format)


def _is_risky(model: nn.Module) -> bool:
    """PyTorch 2.13 on a CPU writes beyond its memory in the gradient of a 1 x 1 convolution with a stride of two whose
    inputs are fewer than a vector has numbers, when channels are last (seen with AVX2)."""
    return device_of(model).type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < _VECTOR
        for module in model.modules()
    )
