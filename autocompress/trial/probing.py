"""What single choices do to a model: the change of its outputs and the bytes, measured, not trained."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.artifact.coder import CoderState
from autocompress.artifact.codes import write_codes
from autocompress.artifact.container import Codes, Plan, decode_artifact, decoded, encode_artifact
from autocompress.artifact.pack import fold_norms, plans, unfold_norms
from autocompress.divergence import divergence, is_comparable
from autocompress.errors import in_words
from autocompress.model.anatomy import Anatomy
from autocompress.model.hooks import Hook, forward_hooks
from autocompress.model.reparametrization import copied
from autocompress.model.replacement import original_names
from autocompress.model.surgery import as_real, assign, owners
from autocompress.recipe import MODEL, Choice, Recipe
from autocompress.seeds import seeded
from autocompress.space import BoundDimension, BoundSpace, without_void
from autocompress.task import Calibration, Task, batch_size
from autocompress.techniques.base import Transform, coding_of, maskings, structures, trainings
from autocompress.trial.compression import Candidate, ShadowedLayer, counted
from autocompress.trial.replay import Replay, can_replay

SAMPLE = 4096
"""Weights of a layer that are coded to predict its bytes; larger layers are scaled up."""
MANY_PROBES = 1000
"""Beyond so many choices to try, alike layers are probed together."""
_RUINED = 1e6
"""The distance of a model whose outputs are no numbers."""
_FEW = 16
_RECIPE_BYTES = 6.0
"""Bytes that the recipe and the step of a layer take in the header."""


class Prober:
    """Measures how far a candidate is from the original on the calibration batches."""

    def __init__(self, task: Task, original: nn.Module, batches: Sequence[Any]) -> None:
        self.task, self.batches = task, batches
        self.batch_statistics = bool(batches) and batch_size(batches[0]) >= _FEW
        self.references = [self._run(original, batch, at) for at, batch in enumerate(batches)]
        self._few = Calibration(task, batches).shortened(original).batches[:2]
        self.can_replay = can_replay(original, self._few, lambda model, batch: self._run(model, batch)[0])

    def on_first(self, count: int) -> Prober:
        """Itself, on so many of its batches."""
        short = copy.copy(self)
        short.batches, short.references = self.batches[:count], self.references[:count]
        return short

    def _run(self, model: nn.Module, batch: Any, seed: int = 0) -> tuple[Any, Any]:
        with torch.no_grad(), _batch_norms(model, self.batch_statistics), seeded(seed):
            return self.task.run(model, batch)

    def distance(
        self, model: nn.Module, since: Callable[[int], AbstractContextManager[None]] = lambda at: nullcontext()
    ) -> float:
        """Mean divergence from the original's outputs or, where these cannot be compared, rise of the loss; infinite
        when it is not a number. since: what the batch at a place is run in."""
        total = 0.0
        for at, (batch, (reference, target)) in enumerate(zip(self.batches, self.references, strict=True)):
            with since(at):
                output, _ = self._run(model, batch, at)
            if is_comparable(reference):
                total += float(divergence(output, reference, target))
            else:  # what the model gives is its loss, or something that its loss alone understands
                total += float(self.task.loss(output, target)) - float(self.task.loss(reference, target))
        value = total / max(len(self.batches), 1)
        return max(value, 0.0) if np.isfinite(value) else _RUINED  # a divergence of nothing may round to below zero

    def effects(
        self,
        candidate: Candidate,
        wanted: Mapping[str, Sequence[Choice]],
        progress: Callable[[float], None] = lambda share: None,
    ) -> dict[str, dict[str, float]]:
        """Rise of the distance by each wanted choice alone: "site:dimension" -> str(choice) -> rise.

        progress: called about ten times with the share that is done.
        """
        candidate.materialise()
        replay = Replay(candidate.model, lambda: self.can_replay and self._run(candidate.model, self._few[0]))
        here = self.distance(candidate.model)
        out: dict[str, dict[str, float]] = {}
        present_choices = candidate.recipe.as_dict()
        told = 0
        for number, (key, choices) in enumerate(wanted.items()):
            if 10 * number // len(wanted) > told:
                told = 10 * number // len(wanted)
                progress(told / 10)
            site, _, dimension = key.rpartition(":")
            present = present_choices.get(key)
            if choices and key not in without_void({**present_choices, key: choices[0]}):
                continue
            out[key] = {}
            for choice in choices:
                there = here if choice == present else self._tried(candidate, replay, site, dimension, choice)
                out[key][str(choice)] = max(0.0, there - here)
        return out

    def _tried(self, candidate: Candidate, replay: Replay, site: str, dimension: str, choice: Choice) -> float:
        """The distance with one more choice; that of a ruined model where it does not run."""
        try:
            return self._distance_with(candidate, replay, site, dimension, choice)
        except Exception as error:  # whatever a model's own code makes of it: it is one choice of many
            log = logging.getLogger("autocompress")
            log.warning("%s:%s is not tried with %s: %s", site, dimension, choice, in_words(error))
            return _RUINED

    def _distance_with(self, candidate: Candidate, replay: Replay, site: str, dimension: str, choice: Choice) -> float:
        if dimension == "weights" or dimension in maskings():
            shadows = [shadow for shadow in candidate.layers.values() if shadow.site == site]
            before = [as_real(shadow.parameter.detach()).clone() for shadow in shadows]
            for shadow in shadows:
                shadow.write(_stored(shadow, dimension, choice))
            places = owners(candidate.model)
            changed = [module for shadow in shadows for module, _ in places[shadow.key]]
            try:
                return self.distance(candidate.model, partial(replay.since, changed))
            finally:
                for shadow, weight in zip(shadows, before, strict=True):
                    shadow.write(weight)
        if dimension == "vectors":
            model = copied(candidate.model)
            stored = _vector_plans(candidate, choice)
            folded = fold_norms(model) | {name: decoded(plan) for name, plan in stored.items()}
            # on their own statistics: the distance is taken with those of the batch, which folding has no place for
            assign(model, unfold_norms(model, folded))
            return self.distance(model)
        if dimension in structures():
            return self.distance(rebuilt(candidate, site, dimension, choice))
        return self.distance(candidate.model)


def rebuilt(candidate: Candidate, site: str, dimension: str, choice: Choice) -> nn.Module:
    """A copy of the candidate's model with one more choice of structure."""
    chosen = counted({site: choice}, dimension, candidate.anatomy)
    return structures()[dimension].apply(copied(candidate.model), chosen, candidate.run)


@contextmanager
def _batch_norms(model: nn.Module, use_batch: bool) -> Iterator[None]:
    """Batch norms take the statistics of the batch: a cheap re-estimation that leaves no trace."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and use_batch]
    saved = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            norm.train(training)


@torch.no_grad()
def _stored(shadow: ShadowedLayer, dimension: str, choice: Choice) -> Tensor:
    """The layer's weight as it would come back from the file with another choice."""
    weight = shadow.masked()
    if dimension != "weights":
        weight = shadow.dense * maskings()[dimension].mask(shadow.dense, choice)
        return shadow.out_of_basis(shadow.coding.simulate(weight, shadow.choice, shadow.learned))
    coding = coding_of(choice)
    return shadow.out_of_basis(coding.simulate(weight, choice, coding.initial(weight, choice).to(weight.device)))


@torch.no_grad()
def already_met(candidate: Candidate, site: str, dimension: str, choices: Sequence[Choice]) -> list[Choice]:
    """The first of these choices of a masking, as many as the stored weights of the layer have the zeros of."""
    weights = [shadow.coefficients() for shadow in candidate.layers.values() if shadow.site == site]
    mask = maskings()[dimension].mask
    return [*itertools.takewhile(lambda choice: all(mask(w, choice)[w != 0].all() for w in weights), choices)]


@torch.no_grad()
def zero_shares(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, float]:
    """Name -> share of zeros in the outputs of these modules while `run()` runs the model that they are in."""
    zeros: dict[str, list[int]] = {}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen = zeros.setdefault(name, [0, 0])
            seen[0] += int((output == 0).sum())
            seen[1] += output.numel()

        return hook

    with forward_hooks((module, watch(name)) for name, module in modules.items()):
        run()
    return {name: count / max(total, 1) for name, (count, total) in zeros.items()}


def wanted_choices(space: BoundSpace) -> dict[str, tuple[Choice, ...]]:
    """Every choice of every dimension that alone changes the model (and not only its training, or the basis in which
    other dimensions do)."""
    return {d.key: d.choices for d in space if d.name not in trainings() and d.name != Transform.name}


def needed_choices(space: BoundSpace, anatomy: Anatomy, most: int = MANY_PROBES) -> dict[str, tuple[Choice, ...]]:
    """The choices that are probed: all that are wanted or, where these are more than `most`, all of the first of alike
    dimensions and the middle one of the others. With less than the usual `most`, dimensions of the same choices are
    alike on all layers at last, and the middle choices go."""
    needed = wanted_choices(space)
    coarser = [(_on_alike_layers(anatomy), 1), (_anywhere, 1), (_anywhere, 0)]
    for like, others in coarser if most < MANY_PROBES else coarser[:1]:
        if choice_count(needed) <= most:
            break
        firsts: dict[Any, str] = {}
        for d in space:
            if d.key in needed:
                first = firsts.setdefault((d.name, d.choices, like(d)), d.key)
                middle = len(d.choices) // 2
                needed[d.key] = d.choices if first == d.key else d.choices[middle : middle + others]
    return needed


def choice_count(choices: Mapping[str, Sequence[Choice]]) -> int:
    """Of all dimensions together."""
    return sum(map(len, choices.values()))


def all_effects(
    measured: Mapping[str, Mapping[str, float]], space: BoundSpace, anatomy: Anatomy
) -> dict[str, dict[str, float]]:
    """The effects of all wanted choices: those that were not measured are those of the first dimension that is alike,
    on a layer that is alike where there is one, by as much more or less as the middle choice has."""
    on_layers, whole, out = _on_alike_layers(anatomy), dict[Any, str](), dict[str, dict[str, float]]()
    for d in space:
        if d.key not in measured:
            continue
        known, alike = measured[d.key], [(d.name, d.choices, like(d)) for like in (on_layers, _anywhere)]
        if len(known) == len(d.choices):
            for kind in alike:
                whole.setdefault(kind, d.key)
            out[d.key] = dict(known)
        elif first := next((whole[kind] for kind in alike if kind in whole), None):
            effects, scale = measured[first], 1.0
            for middle, effect in known.items():
                scale = (effect + 1e-9) / (effects[middle] + 1e-9)
            out[d.key] = {choice: rise * scale for choice, rise in effects.items()} | dict(known)
    return out


def _anywhere(dimension: BoundDimension) -> None:
    """Dimensions of the same choices are alike on all layers."""


def _on_alike_layers(anatomy: Anatomy) -> Callable[[BoundDimension], Any]:
    """Dimension -> what is the same of layers of one kind and shape."""
    layers = {layer.name: (layer.kind, layer.shape) for layer in anatomy.layers}
    return lambda dimension: layers.get(dimension.site)


@torch.no_grad()
def layer_bytes(candidate: Candidate, space: BoundSpace, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Bytes of each of these layers alone for every combination of its transform, coding and maskings.

    Layer -> "choice|choice|..." (in the order of the space's dimensions of that layer) -> bytes.
    """
    table: dict[str, dict[str, float]] = {}
    for name in names:
        shadow = candidate.layers[name]
        dims = [d for d in space if d.site == name and d.name not in structures()]
        weight = shadow.out_of_basis(shadow.dense)
        rows = max(1, SAMPLE // max(1, weight[0].numel()))
        sample = weight[:: -(-weight.shape[0] // rows)] if weight.numel() > SAMPLE else weight
        scale = weight.numel() / sample.numel()
        row = table.setdefault(name, {})
        offered = next((d.choices for d in dims if d.name == Transform.name), (Transform.default,))
        bases = {choice: candidate.basis(name, tuple(sample.shape), choice) for choice in offered}
        in_each = {choice: basis.analysed(sample) if basis else sample for choice, basis in bases.items()}
        for combination in itertools.product(*(d.choices for d in dims)):
            chosen = dict(zip((d.name for d in dims), combination, strict=True))
            masked = in_each[chosen.get(Transform.name, Transform.default)]
            for dimension, masking in maskings().items():
                if dimension in chosen:
                    masked = masked * masking.mask(masked, chosen[dimension])
            choice = chosen.get("weights", "float32")
            coding = coding_of(choice)
            codes = coding.encode(masked, choice, coding.initial(masked, choice).to(masked.device)).codes
            row["|".join(map(str, combination))] = coded_bytes(codes, *coding.layout(choice), coding.repeats) * scale
    return table


def weights_left(candidate: Candidate, space: BoundSpace) -> dict[str, dict[str, dict[str, float]]]:
    """Share of the weights of each layer that a choice of structure leaves, where it is not all of them.

    key -> str(choice) -> layer -> share; channels are left out, their shares multiply.
    """
    whole = {layer.name: layer.numel for layer in candidate.anatomy.layers}
    sites = {layer.parameter: layer.name for layer in candidate.anatomy.layers}
    out: dict[str, dict[str, dict[str, float]]] = {}
    for dimension in space:
        technique = structures().get(dimension.name)
        if technique is None or not technique.permanent or dimension.name == "channels":
            continue
        for choice in dimension.choices:
            left = dict.fromkeys(whole, 0)
            model = rebuilt(candidate, dimension.site, dimension.name, choice)
            for key, name in original_names(model).items():
                if name in sites and model.get_parameter(key).ndim > 1:
                    left[sites[name]] += as_real(model.get_parameter(key)).numel()
            changed = {name: count / whole[name] for name, count in left.items() if count != whole[name]}
            out.setdefault(dimension.key, {})[str(choice)] = changed
    return out


def coded_bytes(codes: Codes, exponent: int, mantissa: int, repeats: bool = False) -> int:
    """Bytes of the entropy-coded stream of these codes alone."""
    state = CoderState()
    write_codes(state, codes, exponent, mantissa, repeats)
    return len(state.finish())


def _vector_plans(candidate: Candidate, choice: Choice) -> dict[str, Plan]:
    """How everything that is not a layer would be stored."""
    weights = candidate.weights()
    recipe = Recipe.of(candidate.recipe.as_dict() | {f"{MODEL}:vectors": choice})
    return {name: plan for name, plan in plans(weights, recipe).items() if name not in weights.layers}


def vector_bytes(candidate: Candidate, space: BoundSpace) -> tuple[dict[str, float], float]:
    """(choice of `vectors` -> bytes of everything that is not a layer, header bytes)."""
    choices = next((d.choices for d in space if d.name == "vectors"), ("float32",))
    out, header = {}, 0.0
    layers = {layer.parameter: Plan(torch.zeros(layer.shape), "float32") for layer in candidate.anatomy.layers}
    for choice in choices:
        artifact = decode_artifact(encode_artifact(layers | _vector_plans(candidate, choice), candidate.recipe))
        out[str(choice)] = float(sum(t.size_bytes for t in artifact.tensors.values()))
        header = artifact.header_bytes + _RECIPE_BYTES * len(candidate.layers)
    return out, header
