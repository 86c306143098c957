"""A trial: recipe + parent -> fine-tune -> write the file -> read it back -> measure."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

import autocompress.techniques  # noqa: F401  (registers the techniques)
from autocompress.allocator import keep_freed_memory
from autocompress.artifact import pack, read_artifact, unpack
from autocompress.chance import loss_unit
from autocompress.errors import in_words
from autocompress.files import ARTIFACT, CHECKPOINT, METRICS, RECIPE, write_file
from autocompress.model.anatomy import Anatomy, read_anatomy
from autocompress.model.reparametrization import copied
from autocompress.recipe import Choice, Recipe
from autocompress.seeds import rewound, seed_everything, seeded
from autocompress.space import BoundDimension, BoundSpace, SearchSpace
from autocompress.task import Calibration, Task, batch_count, batch_size, measure, targets_of_each, to_device
from autocompress.techniques.base import TrainingTechnique, Transform, maskings, only_trains, trainings
from autocompress.trial.batch_norms import re_estimate
from autocompress.trial.compression import Candidate, activation_modules
from autocompress.trial.grids import with_grids
from autocompress.trial.memory_format import put_channels_last
from autocompress.trial.probing import (
    MANY_PROBES,
    Prober,
    all_effects,
    already_met,
    choice_count,
    layer_bytes,
    needed_choices,
    vector_bytes,
    weights_left,
    zero_shares,
)
from autocompress.trial.rate import RateModel
from autocompress.trial.reconstruction import reconstruct
from autocompress.trial.training import fine_tune, step_costs, try_autocast
from autocompress.trial.views import Samples

_CALIBRATION, _CLASSES, _MOST_WORTH = 192, 32, 24
"""Samples on which choices are probed. One of many targets, such as a text that is predicted word by word, counts once
for every so many of them, and so often at most."""
_PROBED = ("weights", "sparsity", "channels", "structure")
"""Dimensions of bytes, whose next heavier choices are probed after a trial."""
_PASSES, _FITTED = 3, 50
"""What a step of training takes, in forward passes; and a trial without training, in tried choices."""
_FAR = 0.003
"""Divergence from the original (nats) from which the full learning rate is used."""


@dataclass(frozen=True)
class TrialSpec:
    """What a worker runs: which candidate, from whose weights, for how long."""

    number: int
    recipe: dict[str, dict[str, Choice]]
    parent: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Rung:
    """A finished epoch: accuracy on the validation split of the candidate as it stands."""

    epoch: int
    epochs: int
    val_accuracy: float | None = None


@dataclass(frozen=True)
class TrialResult:
    """size_bytes: bytes of the file on disk. val_accuracy: of the model decoded from that file.

    estimated_bytes: of the rate model on the fine-tuned weights, before packing. effects: rise of the
    output distance by each neighbouring choice, probed at the fine-tuned weights. reached: the heaviest choice of a
    masking that these weights already meet, where it is more than the recipe asks. activation_sparsity: name
    of an activation -> share of zeros in its output, of the decoded model on the calibration batches.
    step_costs: precision -> seconds and bytes of one step (see `training.step_costs`), where it was mixed.
    """

    size_bytes: int
    val_accuracy: float
    estimated_bytes: float
    seconds: float
    effects: dict[str, dict[str, float]] = field(default_factory=dict)
    reached: dict[str, Choice] = field(default_factory=dict)
    activation_sparsity: dict[str, float] = field(default_factory=dict)
    step_costs: dict[str, dict[str, float]] = field(default_factory=dict)


def calibration_batches(task: Task, device: torch.device) -> Calibration:
    """The first training batches, until they hold 192 samples, or fewer where each has many targets."""
    batches, count = [], 0
    with seeded(0):
        for batch in task.batches("train"):
            batches.append(to_device(batch, device))
            count += batch_size(batch) * min(max(1, targets_of_each(batch) // _CLASSES), _MOST_WORTH)
            if count >= _CALIBRATION:
                break
    return Calibration(task, batches)


def _in_units(task: Task, unit: float) -> Task:
    """The task with its loss divided by `unit`."""
    return task if unit == 1 else replace(task, loss=lambda output, target: task.loss(output, target) / unit)


class Workshop:
    """What a worker keeps between trials: the original model, its anatomy, the calibration batches.

    folder: the run folder; trials write into `folder/trials/<number>/` and nowhere else.
    """

    def __init__(
        self,
        task: Task,
        original: nn.Module,
        space: BoundSpace | SearchSpace,
        folder: Path,
        seed: int,
        device: str = "cpu",
    ) -> None:
        keep_freed_memory()
        self.folder, self.seed = folder, seed
        self.device = torch.device(device)
        self.original = original.to(self.device).eval()
        calibration = calibration_batches(task, self.device)
        self.task = _in_units(task, loss_unit(calibration, self.original))
        batch_count(self.task)  # now, not in the midst of a trial, whose random numbers it may draw
        self.calibration = replace(calibration, task=self.task)
        put_channels_last(self.original, self.calibration)  # so of every candidate, which are copies of it
        anatomy = read_anatomy(self.original, self.calibration.shortened(self.original))
        self.anatomy: Anatomy = with_grids(anatomy, self.original, self.calibration)
        if isinstance(space, SearchSpace):
            offered = [d for d in space.bind(self.anatomy) if task.epochs or not only_trains(d.name)]
            space = BoundSpace(tuple(d for d in map(self._as_far_as_it_runs, offered) if d))
        self.space = space

    @cached_property
    def prober(self) -> Prober:
        return Prober(self.task, self.original, self.calibration.batches)

    @cached_property
    def samples(self) -> Samples:
        return Samples(self.task, self.original, self.prober.can_replay)

    @cached_property
    def trial_prober(self) -> Prober:
        """On so few batches that the probes of a trial see no more of them than its fine-tuning does: they are forward
        passes, so a quarter of its work."""
        seen = batch_count(self.task) * self.task.epochs // max(1, sum(d.name in _PROBED for d in self.space))
        return self.prober.on_first(max(1, seen))

    @classmethod
    def on(cls, task: Task, space: SearchSpace, folder: Path, seed: int = 0) -> Workshop:
        """A workshop for a trained model, with `space` bound to it."""
        return cls(task, task.build(), space, folder, seed)

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def probe_seconds(self) -> float:
        """About how long it takes to try one choice."""
        prober = self.prober
        began = time.monotonic()
        prober.distance(self.original)
        return time.monotonic() - began

    def trial_probes(self) -> float:
        """About how many choices can be tried in the time of a trial: each is a forward pass of all batches."""
        return _PASSES * batch_count(self.task) * self.task.epochs / len(self.calibration.batches) or _FITTED

    def base_profile(
        self, progress: Callable[[float], None] = lambda share: None, probes: int = MANY_PROBES
    ) -> dict[str, Any]:
        """Effects and bytes of every single choice on the original model, as plain data.

        progress: called now and then with the share of the choices that has been tried. probes: if there are more
        choices, the effects of some are concluded from others.
        """
        return self.joined_profile([self.profile_part(0, 1, progress, probes)])

    def profile_part(
        self,
        part: int,
        parts: int,
        progress: Callable[[float], None] = lambda share: None,
        probes: int = MANY_PROBES,
    ) -> dict[str, Any]:
        """`base_profile` of every `parts`-th dimension and layer, from the `part`-th on."""
        given = {d.key: d.choices[0] for d in self.space if d.name == Transform.name and len(d.choices) == 1}
        candidate = Candidate(self.original, self.anatomy, Recipe.of(given), self.calibration)
        vectors, header = vector_bytes(candidate, self.space)
        needed = needed_choices(self.space, self.anatomy, probes)
        return {
            "probes": choice_count(needed),
            "effects": self.prober.effects(candidate, dict(list(needed.items())[part::parts]), progress),
            "layer_bytes": layer_bytes(candidate, self.space, list(candidate.layers)[part::parts]),
            "weights_left": weights_left(candidate, self.space),
            "vector_bytes": vectors,
            "header_bytes": header,
        }

    def joined_profile(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The profile, of all its parts."""
        found = {name: {k: v for part in parts for k, v in part[name].items()} for name in ("effects", "layer_bytes")}
        return {**parts[0], **found, "effects": all_effects(found["effects"], self.space, self.anatomy)}

    def run(self, spec: TrialSpec) -> Iterator[Rung | TrialResult]:
        """Yields a Rung after each epoch and the TrialResult at last; raises whatever goes wrong."""
        began = time.monotonic()
        seed_everything(self.seed * 1_000_003 + spec.number)
        folder = self.trial_folder(spec.number)
        recipe = Recipe.from_json(spec.recipe)
        write_file(folder / RECIPE, json.dumps(spec.recipe, indent=1).encode())
        state, start, parent_recipe = None, None, None
        if spec.parent is not None and self.task.epochs:
            parent = self.trial_folder(spec.parent)
            state = load_file(parent / CHECKPOINT, device=str(self.device))
            parent_recipe = Recipe.from_json(json.loads((parent / RECIPE).read_text()))
            shares = parent_recipe.dimension("sparsity").items()
            start = {site: share for site, share in shares if isinstance(share, float)}
        candidate = Candidate(self.original, self.anatomy, recipe, self.calibration, state, parent_recipe)
        epochs = self.task.epochs if spec.epochs is None else spec.epochs
        if not self.task.epochs:
            reconstruct(candidate, self.samples)
        rate = RateModel(candidate)
        learning_rate = self._learning_rate(candidate) if epochs else None
        for epoch in fine_tune(self.task, candidate, self.original, epochs, start, learning_rate, rate):
            halfway = epoch == (epochs + 1) // 2 and epoch < epochs
            if halfway or epoch == epochs:
                re_estimate(self.task, candidate.model)
            yield Rung(epoch, epochs, measure(self.task, candidate.model, "val") if halfway else None)
        if not rate.factors:
            rate.calibrate()
        rate.refresh()
        estimate = rate.bytes()
        path = folder / ARTIFACT
        write_file(path, pack(candidate.weights(), recipe))
        decoded = unpack(read_artifact(path), self.task.build()).to(self.device)
        accuracy = measure(self.task, decoded, "val")
        write_file(folder / CHECKPOINT, save(candidate.state()))
        reached, beyond = self._neighbours(candidate)
        effects = self.trial_prober.effects(candidate, beyond)
        zeros = zero_shares(activation_modules(decoded, self.anatomy), lambda: self.calibration(decoded))
        costs = step_costs(candidate, self.calibration)
        result = TrialResult(
            path.stat().st_size, accuracy, estimate, time.monotonic() - began, effects, reached, zeros, costs
        )
        shown = {key: value for key, value in asdict(result).items() if key != "effects"}
        write_file(folder / METRICS, json.dumps({**shown, "parent": spec.parent}, indent=1).encode())
        yield result

    def finish(self, number: int, recipe: Recipe, parent: int | None = None) -> TrialResult:
        """Run one trial to its end; raises whatever goes wrong. parent: a trial of this folder to start from."""
        *_, result = self.run(TrialSpec(number, recipe.to_json(), parent))
        assert isinstance(result, TrialResult)
        return result

    def _as_far_as_it_runs(self, dimension: BoundDimension) -> BoundDimension | None:
        """Without the choices with which the model cannot be trained; None if nothing is left to choose."""
        technique = trainings().get(dimension.name)
        if technique is None or type(technique).autocast is TrainingTechnique.autocast:
            return dimension
        runs = tuple(choice for choice in dimension.choices if self._trains(technique, choice))
        return replace(dimension, choices=runs) if runs and runs != (dimension.default,) else None

    def _trains(self, technique: TrainingTechnique, choice: Choice) -> bool:
        """Whether it can, by one forward pass of a copy."""
        if choice == technique.default:
            return True
        model = copied(self.original).train()
        try:
            with rewound():
                try_autocast(self.calibration, model, technique.autocast(choice, self.device))
        except Exception as error:  # an operation of the model's, or its loss, may not take such numbers
            name, reason = technique.name, in_words(error)
            logging.getLogger("autocompress").warning("%s %s is left out: it does not train: %s", name, choice, reason)
            return False
        return True

    def _learning_rate(self, candidate: Candidate) -> float:
        """The task's rate for candidates far from the original, less for those that hardly moved:
        they have little to win and much to lose."""
        candidate.materialise()
        distance = self.prober.distance(candidate.model)
        return self.task.learning_rate * min(1.0, max(0.05, math.sqrt(distance / _FAR)))

    def _neighbours(self, candidate: Candidate) -> tuple[dict[str, Choice], dict[str, list[Choice]]]:
        """(what maskings have come to without being asked, the next heavier choice of each dimension of bytes)."""
        present = self.space.complete(candidate.recipe)
        reached, beyond = {}, {}
        for d in self.space:
            if d.name not in _PROBED:
                continue
            at = d.choices.index(present[d.key]) if present[d.key] in d.choices else -1
            heavier = d.choices[at + 1 :]
            met = already_met(candidate, d.site, d.name, heavier) if d.name in maskings() else []
            if met:
                reached[d.key] = met[-1]
            if len(met) < len(heavier):
                beyond[d.key] = [heavier[len(met)]]
        return reached, beyond
