"""Bit width of activations: the input of a layer is rounded to 2^b levels.

Uniform affine quantisation with a range learned from what passes through while fine-tuning
(exponential moving average of minimum and maximum) and a straight-through gradient (Jacob et al.,
CVPR 2018). The range travels in the file as two buffers of the layer's quantiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.anatomy import Anatomy, Run
from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import StructureTechnique, register, straight_through

SUBMODULE = "input_quantizer"


class InputQuantizer(nn.Module):
    """Rounds a float tensor of any shape to 2^bits levels between `low` and `high`."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x.detach())
        low, high = self.low.to(x.dtype), self.high.to(x.dtype)
        step = ((high - low) / (2**self.bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
        rounded = ((x - low) / step).round().clamp(0, 2**self.bits - 1) * step + low
        clipped = torch.minimum(torch.maximum(x, low), high)
        return straight_through(rounded, clipped)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        low, high = x.amin().float().clamp_max(0), x.amax().float().clamp_min(0)
        fresh = bool(self.high == self.low)
        self.low.copy_(low if fresh else self.low.lerp(low, 0.1))
        self.high.copy_(high if fresh else self.high.lerp(high, 0.1))


class _QuantizeInput:
    """Pre-forward hook, a class so that it can be copied and pickled with the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (module.get_submodule(SUBMODULE)(args[0]), *args[1:])


class ActivationBits(StructureTechnique):
    name = "activation_bits"
    default = 32
    about = "bit width of the input of a layer; 32 leaves it in float"

    def parse(self, raw: Any) -> Choice:
        if raw != 32 and (isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= 16):
            raise SpaceError(f"choice {raw!r} does not exist; give 32 (float) or whole bits from 1 to 16")
        return int(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return anatomy.inputs

    def apply(
        self, model: nn.Module, chosen: Mapping[str, Choice], run: Run, options: Mapping[str, Choice] | None = None
    ) -> nn.Module:
        self.restore(model, chosen)
        quantizers = [m for m in model.modules() if isinstance(m, InputQuantizer)]
        fresh = [quantizer for quantizer in quantizers if bool(quantizer.high == quantizer.low)]
        if fresh:
            for quantizer in fresh:
                quantizer.train()
            with torch.no_grad():
                run(model)
            for quantizer in fresh:
                quantizer.eval()
        return model

    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> nn.Module:
        for name, choice in chosen.items():
            layer = model.get_submodule(name)
            present = layer._modules.get(SUBMODULE)
            if choice == self.default:
                continue
            if isinstance(present, InputQuantizer):
                present.bits = int(choice)
                continue
            layer.add_module(SUBMODULE, InputQuantizer(int(choice)).eval())
            layer.register_forward_pre_hook(_QuantizeInput())
        return model


register(ActivationBits())
