"""Bit width of activations: the input of a layer is rounded to 2^b levels.

Uniform affine quantisation with a straight-through gradient (Jacob et al., CVPR 2018). The range follows what
passes through while fine-tuning (exponential moving average), or is trained: see `clipping.py`. It travels in
the file as two tensors of the layer's quantiser.

Not for layers that are fed with integers (embeddings) or called with tensors as keywords only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.model.anatomy import Anatomy
from autocompress.model.replacement import Elementwise
from autocompress.recipe import Choice
from autocompress.task import Calibration, device_of
from autocompress.techniques.base import StructureTechnique, register, straight_through
from autocompress.techniques.clipping import ActivationClipping, clip_range

SUBMODULE = "input_quantizer"


class InputQuantizer(Elementwise):
    """Rounds a float tensor of any shape to 2^bits levels between `low` and `high`, float32 scalars."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.clipping = "max"
        self.low = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.high = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x.detach())
        # a layer that is called twice observes again before it is asked for the gradients of this call
        low, high = (bound.clone().to(x.dtype) for bound in (self.low, self.high))
        step = ((high - low) / (2**self.bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
        scaled = ((torch.minimum(torch.maximum(x, low), high) - low) / step).clamp(0, 2**self.bits - 1)
        quantized: Tensor = straight_through(scaled.round(), scaled) * step + low
        return quantized

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        fresh = bool(self.high == self.low)
        self.high.requires_grad_(self.clipping == "learned")
        self.low.requires_grad_(self.clipping == "learned" and bool(self.low < 0))
        if self.clipping == "learned" and not fresh:
            return
        low, high = clip_range(x, 2**self.bits - 1, "mse" if self.clipping == "learned" else self.clipping)
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

    def examples(self) -> Sequence[Choice]:
        return (32, 8, 4, 1)

    def parse(self, raw: Any) -> Choice:
        if raw != 32 and (isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= 16):
            raise SpaceError(f"choice {raw!r} does not exist; give 32 (float) or whole bits from 1 to 16")
        return int(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return anatomy.inputs

    def apply(
        self,
        model: nn.Module,
        chosen: Mapping[str, Choice],
        run: Calibration,
        options: Mapping[str, Choice] | None = None,
    ) -> nn.Module:
        self.restore(model, chosen)
        quantizers = [m for m in model.modules() if isinstance(m, InputQuantizer)]
        for quantizer in quantizers:
            quantizer.clipping = str((options or {}).get(ActivationClipping.name, ActivationClipping.default))
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
            layer.add_module(SUBMODULE, InputQuantizer(int(choice)).eval().to(device_of(layer)))
            layer.register_forward_pre_hook(_QuantizeInput())
        return model


register(ActivationBits())
