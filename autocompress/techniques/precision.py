"""Precision of fine-tuning: mixed precision with bfloat16 anywhere, with float16 on CUDA.

Micikevicius et al., Mixed Precision Training, ICLR 2018. The file is the same kind of file; only the
speed and the noise of training change.

Not for float16 without CUDA, nor for a model with operations that do not take it; bfloat16 on a CPU without arithmetic
for it only where nothing else is offered: it takes up to nine times as long there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, register


class Precision(TrainingTechnique):
    name = "precision"
    default = "float32"
    about = "arithmetic of fine-tuning: float32, bfloat16, or (on CUDA only) float16"

    def examples(self) -> Sequence[Choice]:
        return ("float32", "bfloat16", "float16")

    def parse(self, raw: Any) -> Choice:
        if raw not in ("float32", "bfloat16", "float16"):
            raise SpaceError(f"choice {raw!r} does not exist; choose from float32, bfloat16, float16")
        return str(raw)

    def available(self, choice: Choice) -> bool:
        return choice != "float16" or torch.cuda.is_available()

    def pays(self, choice: Choice) -> bool:
        return choice != "bfloat16" or torch.cuda.is_available() or _bfloat16_on_cpu()

    def autocast(self, choice: Choice, device: torch.device) -> AbstractContextManager[Any]:
        if choice == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.float16 if choice == "float16" else torch.bfloat16)


def _bfloat16_on_cpu() -> bool:
    """Whether the CPU has instructions for it (AVX-512 BF16, AMX, those of Arm); older PyTorch does not tell."""
    told = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    return any(has for name, has in told.items() if "bf16" in name)


register(Precision())
