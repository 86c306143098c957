"""Batch norms after fine-tuning: statistics of the model as it has become.

For half a hundred steps running averages remember the original, and weights that are rounded anew in each leave
them noisy (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021; Nagel et al., Overcoming Oscillations in
Quantization-Aware Training, ICML 2022).
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from autocompress.task import Task, device_of, to_device

_BATCHES = 64
"""Of the training split; all if there are fewer."""


@torch.no_grad()
def re_estimate(task: Task, model: nn.Module) -> None:
    """The mean over training batches, of the norms that learn theirs in training; leaves the model in eval mode."""
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    learning = [norm for norm in norms if norm.running_mean is not None]
    model.eval()
    if not learning:
        return
    before = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in learning]
    for norm in learning:
        norm.reset_running_stats()
        norm.train().momentum = None
    for batch in itertools.islice(task.batches("train"), _BATCHES):
        task.run(model, to_device(batch, device_of(model)))
    for norm, momentum, kept in before:
        norm.eval().momentum = momentum
        if not norm.num_batches_tracked:  # the model did without
            norm.load_state_dict(kept)
