"""Which biases are worth their bits.

A bias takes about six bits; all of them come to a quarter of the file of a small transformer. One is set to zero where
the loss would feel that less than the price of bits makes of what it saves: by half its square times the curvature
(optimal brain damage, LeCun et al., 1990), for which the second moments of Adam stand in.

Not for those of batch norms, whose shift in the file depends on statistics that go on changing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocompress.artifact import Artifact
from autocompress.trial.compression import Candidate


class Biases:
    """Those of a candidate while it is fine-tuned. optimizer: an Adam, which has seen them by the time of `draw`."""

    def __init__(self, candidate: Candidate, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        norms = [m for m in candidate.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        shifts = {id(norm.bias) for norm in norms}
        vectors = {n: p for n, p in candidate.model.named_parameters() if p.ndim == 1 and p.numel() > 1}
        self._values = {n: p for n, p in vectors.items() if "bias" in n.rpartition(".")[2] and id(p) not in shifts}
        self._pruned: list[tuple[Tensor, Tensor]] = []
        """(biases, which of them are zero from now on)."""

    @torch.no_grad()
    def draw(self, artifact: Artifact, penalty: float, samples: int) -> None:
        """Decide which are zero from now on. artifact: the candidate as it would be stored. penalty: nats of loss that
        half its bytes are worth. samples: of a batch."""
        price = penalty / (8 * math.log(2) * artifact.size_bytes)
        decay = self._optimizer.param_groups[0]["betas"][1]
        for name, value in self._values.items():
            state = self._optimizer.state.get(value)
            if state:
                stored = artifact.tensors[name]
                bits = 8 * stored.size_bytes / max(1, int(stored.value.count_nonzero()))
                curvature = samples * state["exp_avg_sq"] / (1 - decay ** state["step"])
                self._pruned.append((value, worthless(curvature * value.square() / 2, bits, price)))
        self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Set to zero what was drawn."""
        for value, zero in self._pruned:
            value.masked_fill_(zero, 0.0)


def worthless(harm: Tensor, bits: float, price: float) -> Tensor:
    """Bool, shape of `harm`: the values that are better zero, those of least harm.

    harm: nats of loss that it takes to do without each. bits: of each that stays; to tell which do takes the entropy of
    their shares. price: nats a bit.
    """
    ordered, order = harm.flatten().sort()
    zeros = torch.arange(len(ordered) + 1, device=harm.device) / len(ordered)
    told = (torch.special.entr(zeros) + torch.special.entr(1 - zeros)) / math.log(2)
    cost = price * len(ordered) * (told + (1 - zeros) * bits)
    cost[1:] += ordered.cumsum(0)
    out = torch.zeros_like(order, dtype=torch.bool)
    out[order[: int(cost.argmin())]] = True
    return out.view_as(harm)
