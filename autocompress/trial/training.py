"""Fine-tuning of a candidate: distillation, straight-through estimator, rate penalty, mixed precision."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.divergence import divergence
from autocompress.errors import TaskError, in_words
from autocompress.recipe import Choice
from autocompress.seeds import rewound
from autocompress.task import Batch, Calibration, Task, batch_count, batch_size, device_of, to_device
from autocompress.techniques.base import IntegerCoding, IntegerWeights, Term, TrainingTechnique, trainings
from autocompress.trial.biases import Biases
from autocompress.trial.compression import Candidate, ShadowedLayer
from autocompress.trial.rate import RateModel

DISTILLATION = 0.5
"""Share of the distillation loss; the rest is the task's own loss."""
TEMPERATURE = 4.0
_MASK_EVERY = 4
_RAMP = 0.5
"""Sparsity reaches its target after this share of the steps (cubic, Zhu and Gupta, 2017)."""
_FREEZE = 0.75
"""From here on masks stay as they are."""
_ROUNDS, _REGROWN = 10, 0.3
"""Rounds of dropping and regrowing if they went on to the end, and the share of the first (Evci et al., 2020)."""
_SETTLE, _CALIBRATE = 0.8, 0.9
_CURVATURE_BATCHES = 8
_LOSS_SCALE = 1024.0
"""At first, of float16: torch's own, 64 times this, overflows in the first steps of a broken model and skips them."""


def fine_tune(
    task: Task,
    candidate: Candidate,
    teacher: nn.Module,
    epochs: int,
    start_sparsity: Mapping[str, float] | None = None,
    learning_rate: float | None = None,
    rate: RateModel | None = None,
) -> Iterator[int]:
    """Fine-tune in place; yields the number of finished epochs after each.

    start_sparsity: layer -> share of zeros from which the sparsity rises to the recipe's. learning_rate:
    peak rate, the task's own by default. rate: the rate model of the candidate, which is calibrated near
    the end.

    Raises TaskError when the loss stops being finite, or has no gradient.
    """
    if epochs < 1:
        return
    run = _FineTuning(task, candidate, teacher, epochs, start_sparsity, learning_rate, rate)
    for epoch in range(1, epochs + 1):
        candidate.model.train()
        for batch in task.batches("train"):
            run.step(batch)
        run.leave_as_asked()
        yield epoch


class _FineTuning:
    """What lasts from one step to the next, and what is due at which step. Arguments as those of `fine_tune`."""

    def __init__(
        self,
        task: Task,
        candidate: Candidate,
        teacher: nn.Module,
        epochs: int,
        start_sparsity: Mapping[str, float] | None,
        learning_rate: float | None,
        rate: RateModel | None,
    ) -> None:
        self.task, self.candidate, self.teacher, self.start_sparsity = task, candidate, teacher, start_sparsity
        self.device = device_of(candidate.model)
        self.choices = {technique.name: choice for technique, choice in candidate.training}
        chosen = [(technique, self.choices[name]) for name, technique in trainings().items()]
        peak = task.learning_rate if learning_rate is None else learning_rate
        self.peak = peak * math.prod(technique.learning_rate_factor(choice) for technique, choice in chosen)
        self.penalty = candidate.penalty
        self.price = torch.tensor(self.penalty, device=self.device)
        weights, others = candidate.trainable()
        groups = [{"params": weights, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
        fused = True if self.device.type in ("cpu", "cuda") else None  # a fifth of a small trial's time
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.peak, fused=fused)
        half = self.device.type == "cuda" and self.choices.get("precision") == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=_LOSS_SCALE, enabled=half)
        self.rate, self.calibrated = rate or RateModel(candidate), rate is None
        self.steps, self.total, self.settled = 0, epochs * batch_count(task), False
        self.every = max(_MASK_EVERY, self.total // _ROUNDS) if candidate.regrows else _MASK_EVERY
        activations = list(candidate.activations().values())
        made = [technique.term(choice, activations) for technique, choice in candidate.training]
        self.terms = [term for term in made if term is not None]
        self.biases, self.samples = Biases(candidate, self.optimizer), 0

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        self._what_is_due()
        candidate, self.samples = self.candidate, batch_size(batch)
        batch = to_device(batch, self.device)
        candidate.materialise(keep_graph=True)
        with ExitStack() as watching:  # until the gradients are there: checkpointed blocks run once more for them
            for term in self.terms:
                watching.enter_context(term)
            loss = _loss(self.task, candidate.model, self.teacher, batch, self.choices, self.terms)
            if not math.isfinite(float(loss.detach())):
                raise TaskError(f"the loss became {float(loss.detach()):g} while fine-tuning")
            if not loss.requires_grad:
                raise TaskError(
                    "the loss has no gradient: the model's forward and the loss must do without torch.no_grad and "
                    "detach"
                )
            self.optimizer.zero_grad()
            torch.autograd.backward(self.scaler.scale(loss))
        candidate.backpropagate()
        if self.penalty and self.rate.tables:  # floats alone have nothing to be priced
            self.rate.backpropagate(self.scaler.scale(self.price))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.biases.prune()
        self.steps += 1

    def _what_is_due(self) -> None:
        """The learning rate of the next step and, each at its time: masks, biases, the last rounding, the rates."""
        candidate, step, last = self.candidate, self.steps, self.steps + 1 >= self.total
        progress = min(step / self.total, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * _schedule(progress)
        if step % self.every == 0 and progress < _FREEZE:
            ramp = 1 - (1 - min(progress / _RAMP, 1.0)) ** 3
            regrown = _REGROWN * (1 + math.cos(math.pi * progress / _FREEZE)) / 2
            candidate.set_masks(share=ramp, start=self.start_sparsity, regrown=regrown)
        if self.penalty and step == math.ceil(_RAMP * self.total):
            self.biases.draw(self.rate.calibrate(), self.penalty, self.samples)
        if (progress >= _SETTLE or last) and not self.settled:
            self.settled = True
            candidate.set_masks()
            _settle(self.task, candidate, self.rate, self.choices)
            candidate.model.train()
        if (progress >= _CALIBRATE or last) and not self.calibrated:
            self.calibrated = True
            self.rate.calibrate()
        if self.penalty and step % _MASK_EVERY == 0:
            self.rate.refresh()

    def leave_as_asked(self) -> None:
        """The model as the recipe asks, ready to be measured, also before fine-tuning is over."""
        if not self.settled and not self.candidate.regrows:
            self.candidate.set_masks()
        self.candidate.materialise()
        self.candidate.model.eval()


def _loss(
    task: Task,
    model: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    choices: Mapping[str, Choice],
    terms: Sequence[Term],
) -> Tensor:
    """The task's own, that of distillation, and the terms, which watch the model."""
    device = device_of(model)
    with ExitStack() as stack:
        for name, technique in trainings().items():
            stack.enter_context(technique.autocast(choices[name], device))
        with torch.no_grad(), rewound():  # what draws random numbers draws the same for both
            reference, _ = task.run(teacher, batch)
        output, target = task.run(model, batch)
    loss = (1 - DISTILLATION) * task.loss(_float(output), target)
    loss = loss + DISTILLATION * divergence(output, reference, target, TEMPERATURE).to(loss.device)
    if terms:
        drift = divergence(output, reference, target).to(loss.device)
        loss = loss + torch.stack([term.loss(drift) for term in terms]).sum()
    return loss


@torch.no_grad()
def try_autocast(run: Calibration, model: nn.Module, autocast: AbstractContextManager[Any]) -> None:
    """A forward pass as those of fine-tuning, and its loss; raises what an operation raises on such numbers."""
    with autocast:
        output, target = run.run(model)
    run.task.loss(_float(output), target)


def step_costs(candidate: Candidate, calibration: Calibration) -> dict[str, dict[str, float]]:
    """What a step costs in the candidate's precision and in float32; empty when that is its precision.

    Precision -> `seconds` (the fastest of five forward and backward passes on a calibration batch) and
    `saved_bytes`, what autograd keeps of the forward pass for the backward pass, each tensor counted once.
    """
    precision = trainings()["precision"]
    chosen = next(choice for technique, choice in candidate.training if technique is precision)
    if chosen == precision.default:
        return {}
    device, out = device_of(candidate.model), {}
    for choice in (precision.default, chosen):
        seconds, saved = [], dict[int, int]()
        for attempt in range(6):
            began = time.perf_counter()
            keep = partial(_count_bytes, saved) if attempt == 0 else lambda tensor: tensor
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                with precision.autocast(choice, device):
                    loss = calibration.loss(candidate.model)
                torch.autograd.backward(loss)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        candidate.model.zero_grad()
        out[str(choice)] = {"seconds": min(seconds[1:]), "saved_bytes": float(sum(saved.values()))}
    return out


def _count_bytes(seen: dict[int, int], tensor: Tensor) -> Tensor:
    seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def _settle(task: Task, candidate: Candidate, rate: RateModel, choices: Mapping[str, Choice]) -> None:
    """The last rounding of integer weights, by the techniques whose choice is not their default."""
    active = [(t, choices[name]) for name, t in trainings().items() if choices[name] != t.default]
    active = [(t, choice) for t, choice in active if type(t).settle is not TrainingTechnique.settle]
    if not active:
        return
    rate.refresh()
    candidate.materialise()
    candidate.model.eval()
    try:
        with torch.backends.cudnn.flags(enabled=False):  # whose RNNs want to be in training
            curvature = _curvature(task, candidate)
    except RuntimeError as error:
        log = logging.getLogger("autocompress")
        log.warning("weights are rounded to the nearest, for the model has no gradients: %s", in_words(error))
        return
    original = sum(layer.numel for layer in candidate.anatomy.layers)
    for technique, choice in active:
        for name, bits in rate.tables.items():
            shadow = candidate.layers[name]
            assert isinstance(shadow.coding, IntegerCoding)
            with torch.no_grad():
                scaled = shadow.coding.scaled(shadow.masked(), shadow.choice, shadow.learned)
                below, above = (_decoded(shadow, codes) for codes in (scaled.floor(), scaled.floor() + 1))
                sensitivity = 0.5 * original * curvature[name] * (above - below).square()
                codes = technique.settle(choice, IntegerWeights(scaled, sensitivity, bits))
                # the pruned stay as they are: they may return
                shadow.dense.copy_(torch.where(scaled == 0, shadow.dense, _decoded(shadow, codes)))


def _decoded(shadow: ShadowedLayer, codes: Tensor) -> Tensor:
    """The weights that a file with these codes would give back."""
    coded = shadow.coding.encode(shadow.masked(), shadow.choice, shadow.learned)
    integers = codes.to(torch.int32).cpu().numpy()
    return shadow.coding.decode(replace(coded, codes=integers), shadow.choice).to(codes.device)


def _curvature(task: Task, candidate: Candidate) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information of each layer, float32, half of it its layer's mean:
    few samples estimate a mean well and a single weight badly."""
    sums = {name: torch.zeros_like(shadow.dense) for name, shadow in candidate.layers.items()}
    count = 0
    for batch in itertools.islice(task.batches("train"), _CURVATURE_BATCHES):
        batch = to_device(batch, device_of(candidate.model))
        output, target = task.run(candidate.model, batch)
        candidate.model.zero_grad()
        torch.autograd.backward(task.loss(_float(output), target))
        for name, shadow in candidate.layers.items():
            gradient = shadow.parameter_gradient()
            if gradient is not None:
                sums[name] += batch_size(batch) * shadow.in_basis(gradient.float()).square()
        count += 1
    candidate.model.zero_grad()
    return {name: (total + total.mean()) / (2 * count) for name, total in sums.items()}


def _float(output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output


def _schedule(progress: float) -> float:
    """Linear warm-up over the first tenth, then a half cosine down to zero."""
    if progress < 0.1:
        return 0.1 + 9 * progress
    return 0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9)
