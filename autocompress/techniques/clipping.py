"""Where quantisers clip: the range that their levels cover.

`max`: all values. `mse`: the range of least squared error. `kl`: the range whose quantised distribution is
nearest to the original's (Migacz, 8-bit inference with TensorRT, 2017). For activations also `percentile`: all
but one of a thousand values at either end; and `learned`: from the range of least squared error on, its ends
are trained with straight-through gradients (Choi et al., PACT, 2018; Bhalgat et al., LSQ+, 2020). The steps of
weights are always trained on (LSQ); here they are only initialised.

Not for float, ternary, binary and codebook weights, which do not clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, register

FRACTIONS = torch.logspace(-1.3, 0, 40)
"""Of the whole range, that are tried."""
_BINS, _SAMPLE, _TAIL = 2048, 16384, 0.001


class _Clipping(TrainingTechnique):
    offered: ClassVar[tuple[str, ...]]

    def examples(self) -> Sequence[Choice]:
        return self.offered

    def parse(self, raw: Any) -> Choice:
        if raw not in self.offered:
            raise SpaceError(f"choice {raw!r} does not exist; choose from {', '.join(self.offered)}")
        return str(raw)


class WeightClipping(_Clipping):
    name, default, offered = "weight_clipping", "mse", ("mse", "kl", "max")
    about = "first range of integer weights, before their steps are trained: mse, kl or max"


class ActivationClipping(_Clipping):
    name, default = "activation_clipping", "max"
    offered = ("max", "percentile", "mse", "kl", "learned")
    about = "range of quantised activations: max, percentile, mse, kl, or learned"


def clip_range(values: Tensor, intervals: int, criterion: str) -> tuple[Tensor, Tensor]:
    """(lowest, highest) value that a quantiser with so many equal intervals should cover; 0 is always covered.

    values: float32 of any shape. Scalars, float32.
    """
    sample = values.detach().float().flatten()
    sample = sample[:: len(sample) // _SAMPLE + 1] if criterion != "max" else sample
    if criterion == "percentile":
        low, high = torch.quantile(sample, sample.new_tensor([_TAIL, 1 - _TAIL]))
    else:
        low, high = sample.aminmax()
    low, high = low.clamp_max(0), high.clamp_min(0)
    if criterion in ("max", "percentile") or low == high:
        return low, high
    errors = [_ERRORS[criterion](sample, low * f, high * f, intervals) for f in FRACTIONS.tolist()]
    best = FRACTIONS[int(torch.stack(errors).argmin())].item()
    return low * best, high * best


def _squared_error(values: Tensor, low: Tensor, high: Tensor, intervals: int) -> Tensor:
    step = (high - low) / intervals
    return (((values - low) / step).round().clamp(0, intervals) * step + low - values).square().mean()


def _divergence(values: Tensor, low: Tensor, high: Tensor, intervals: int) -> Tensor:
    """KL divergence of the values, clipped, from their quantised distribution, in nats; without zeros, which
    are not rounded.

    Both are histograms over the range, of about 8 values a bin or more. In the quantised one each level's
    values are spread evenly over those of its bins that are not empty; what was clipped is in the first
    distribution's last bins only.
    """
    values = values[values != 0]
    bins = max(4 * intervals, min(_BINS, len(values) // 8))
    inside = torch.histc(values, bins, float(low), float(high)).double()
    clipped = inside.clone()
    clipped[0] += (values < low).sum()
    clipped[-1] += (values > high).sum()
    centers = (torch.arange(bins, device=values.device) + 0.5) / bins * intervals
    level, filled = centers.round().long(), (inside > 0).double()
    sums = torch.zeros(intervals + 1, dtype=torch.float64, device=values.device)
    share = sums.index_add(0, level, inside) / sums.index_add(0, level, filled).clamp_min(1)
    p, q = clipped / clipped.sum(), (share[level] * filled).clamp_min(1e-9)
    return torch.where(p > 0, p * (p.clamp_min(1e-30) / (q / q.sum())).log(), 0).sum()


_ERRORS = {"mse": _squared_error, "kl": _divergence}

register(WeightClipping())
register(ActivationClipping())
