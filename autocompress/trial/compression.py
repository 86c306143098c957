"""Recipe + model -> the compressed model, while it is fine-tuned.

The model's own parameters hold what the file will hold: before each forward pass `materialise` writes
the masked and coded weights into them, after the backward pass `backpropagate` hands their gradients
on to the dense weights behind. So any module can be compressed, whatever it does with its weights:
recurrent layers, tied weights, functional calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.artifact import Weights
from autocompress.artifact.basis import Basis
from autocompress.artifact.container import Plan
from autocompress.model.anatomy import Anatomy, layer_name
from autocompress.model.reparametrization import copied
from autocompress.model.replacement import original_names, origins
from autocompress.model.surgery import as_real, assign, owners, tensors
from autocompress.recipe import MODEL, Choice, Recipe
from autocompress.space import without_void
from autocompress.task import Calibration
from autocompress.techniques.base import (
    Coding,
    Masking,
    SparseLayer,
    TrainingTechnique,
    Transform,
    coding_of,
    maskings,
    structures,
    trainings,
    transforms,
)
from autocompress.techniques.channels import kept_channels
from autocompress.techniques.clipping import WeightClipping
from autocompress.trial.memory_format import mend_memory_format

_STEP = "autocompress.parameters/"


@dataclass
class ShadowedLayer:
    """One weight: its parameter in the model, the dense weight behind, mask and coding.

    site: the layer of the original that it is, or is a part of. key: its first name in the model. mask: float32, 1
    where weights stay and 0 elsewhere (to multiply by a Boolean tensor takes several times as long).
    gradient: of all weights in the last step, the pruned ones too, where regrowing needs it. basis: in which dense
    weight, mask and gradient are, if it is not the model's own.
    """

    site: str
    key: str
    parameter: nn.Parameter
    dense: Tensor
    choice: Choice
    coding: Coding
    learned: Tensor
    basis: Basis | None = None
    mask: Tensor | None = None
    gradient: Tensor | None = None
    _effective: Tensor | None = None

    def write(self, weight: Tensor) -> None:
        """What the model computes with."""
        as_real(self.parameter.data).copy_(weight.detach())

    def parameter_gradient(self) -> Tensor | None:
        """The gradient of what the model computed with, shape of the layer."""
        return None if self.parameter.grad is None else as_real(self.parameter.grad)

    def masked(self) -> Tensor:
        return self.dense if self.mask is None else self.dense * self.mask

    def coefficients(self) -> Tensor:
        """float32, shape of the layer: what the file will hold; differentiable. The weights, or theirs in its basis."""
        return self.coding.simulate(self.masked(), self.choice, self.learned)

    def effective(self) -> Tensor:
        """float32, shape of the layer: what the file will give back; differentiable, and then but for round-off."""
        coefficients = self.coefficients()
        if self.basis and not coefficients.requires_grad:
            return self.basis.read(coefficients)
        return self.out_of_basis(coefficients)

    def in_basis(self, weight: Tensor) -> Tensor:
        """float32, as `dense`, of a weight or a gradient as the model has it."""
        return self.basis.analysed(weight) if self.basis else weight

    def out_of_basis(self, coefficients: Tensor) -> Tensor:
        """Inverse of `in_basis`."""
        return self.basis.synthesised(coefficients) if self.basis else coefficients


class Candidate:
    """A model compressed by a recipe, ready to be fine-tuned, stored or probed.

    `state` is a parent's `state()` and `parent_recipe` its recipe; without, the candidate starts from the
    original model. The structure of the parent may only be larger.
    """

    def __init__(
        self,
        original: nn.Module,
        anatomy: Anatomy,
        recipe: Recipe,
        run: Calibration,
        state: Mapping[str, Tensor] | None = None,
        parent_recipe: Recipe | None = None,
    ) -> None:
        recipe = Recipe.of(without_void(recipe.as_dict()))
        self.anatomy, self.recipe, self.run = anatomy, recipe, run
        options = {dimension: choice for site, dimension, choice in recipe if site == MODEL}
        self.training = [(technique, options.get(name, technique.default)) for name, technique in trainings().items()]
        self.regrows = any(
            choice != technique.default and type(technique).regrown is not TrainingTechnique.regrown
            for technique, choice in self.training
        )
        self.penalty = math.fsum(technique.penalty(choice) for technique, choice in self.training)
        """Price of the estimated rate: nats of loss that half the bits of all layers are worth."""
        self._clipping = str(options.get(WeightClipping.name, WeightClipping.default))
        parent = dict(state or {})
        learned = {k.removeprefix(_STEP): parent.pop(k) for k in list(parent) if k.startswith(_STEP)}
        self.model = self._built(original, parent, parent_recipe, options)
        self.layers: dict[str, ShadowedLayer] = {}
        places = owners(self.model)
        for key, site in self._weights():
            parameter = getattr(*places[key][0])
            choice = recipe.get(site, "weights", "float32")
            assert choice is not None
            coding = coding_of(choice)
            weight = as_real(parameter.detach()).float().clone()
            basis = self.basis(site, tuple(weight.shape), recipe.get(site, Transform.name) or Transform.default)
            shadow = ShadowedLayer(site, key, parameter, weight, choice, coding, torch.empty(0), basis)
            shadow.dense = shadow.in_basis(weight)
            self.layers[layer_name(key)] = shadow
        self.set_masks()
        for name, shadow in self.layers.items():
            known = learned.get(f"{name}|{shadow.choice}")
            if known is not None and len(known) == shadow.coding.parameters(shadow.choice, tuple(shadow.dense.shape)):
                shadow.learned = known.clone().to(shadow.dense.device)
            else:
                self.fit_steps(shadow)

    def _built(
        self,
        original: nn.Module,
        parent: Mapping[str, Tensor],
        parent_recipe: Recipe | None,
        options: Mapping[str, Choice],
    ) -> nn.Module:
        """The original with the structure of the recipe, and the weights of the parent if there are some."""
        model = copied(original).eval()
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False  # gradients that any optimizer and any technique takes
        if parent:
            for name, structure in structures().items():
                if structure.permanent and parent_recipe is not None:
                    model = structure.restore(model, parent_recipe.dimension(name))
            _assign_known(model, parent)
        mend_memory_format(model)
        for name, structure in structures().items():
            model = structure.apply(model, counted(self.recipe.dimension(name), name, self.anatomy), self.run, options)
        if parent:
            _assign_known(model, parent)
        mend_memory_format(model)
        return model

    def fit_steps(self, shadow: ShadowedLayer) -> None:
        """The learned parameters of its coding, as they suit its weights before any training."""
        fitted = shadow.coding.initial(shadow.masked(), shadow.choice, self._clipping)
        shadow.learned = fitted.to(shadow.dense.device)

    def _weights(self) -> list[tuple[str, str]]:
        """(name of the tensor, site) of all weights that are layers of the original, or parts of one."""
        sites = {layer.parameter: layer.name for layer in self.anatomy.layers}
        return [
            (key, sites[name])
            for key, name in original_names(self.model).items()
            if name in sites and self.model.get_parameter(key).ndim > 1
        ]

    def basis(self, site: str, shape: tuple[int, ...], choice: Choice) -> Basis | None:
        """Of a tensor of this shape that is a layer, or a part of one; None where it does not lie on a grid."""
        transform, grid = transforms().get(choice), self.anatomy.layer(site).grid
        if transform is None or not grid or (len(shape) == 2 and shape[1] % math.prod(grid)):
            return None
        return Basis(transform, grid[-1] if len(shape) == 2 else 0)

    def set_masks(self, share: float = 1.0, start: Mapping[str, float] | None = None, regrown: float = 0.0) -> None:
        """Draw the masks from the weights as they are, at `share` of the way from `start` (site -> share of
        zeros) to the recipe's sparsity. regrown: share of what stays that may be exchanged for pruned weights."""
        for name, targets in self.targets(share, start).items():
            shadow = self.layers[name]
            weight = (shadow.masked() if self.regrows and share > 0 else shadow.dense).detach()
            mask = drawn_mask(weight, targets)
            shares = all(isinstance(target, float) for target in targets.values())
            if mask is not None and regrown and shares and shadow.gradient is not None:
                for technique, choice in self.training:
                    mask = technique.regrown(choice, mask, weight, shadow.gradient, regrown)
            shadow.mask = None if mask is None else mask.float()

    def targets(self, share: float = 1.0, start: Mapping[str, float] | None = None) -> dict[str, dict[str, Choice]]:
        """Layer -> dimension of each masking -> what is asked of the layer by now (see `set_masks`)."""
        asked = {name: self._targets(name, masking, share, start or {}) for name, masking in maskings().items()}
        return {layer: {name: asked[name][layer] for name in asked} for layer in self.layers}

    def _targets(self, dimension: str, masking: Masking, share: float, start: Mapping[str, float]) -> dict[str, Choice]:
        """Layer -> what its mask should be now: shares on their way, exchanged between layers where asked."""
        targets: dict[str, Choice] = {}
        for name, shadow in self.layers.items():
            target = self.recipe.get(shadow.site, dimension, masking.default)
            assert target is not None
            if share < 1 and isinstance(target, float):
                first = min(start.get(shadow.site, 0.0), target)
                target = first + (target - first) * share
            targets[name] = target
        pruned = [name for name, target in targets.items() if isinstance(target, float) and target > 0]
        for technique, choice in self.training:
            if choice != technique.default:
                shadows = [self.layers[name] for name in pruned]
                layers = [
                    SparseLayer(shadow.dense.detach(), float(targets[name]), shadow.coding.bits(shadow.choice))
                    for name, shadow in zip(pruned, shadows, strict=True)
                ]
                targets |= dict(zip(pruned, technique.exchanged(choice, layers), strict=True))
        return targets

    # ------------------------------------------------------------ simulation

    def activations(self) -> dict[str, nn.Module]:
        """Name -> module of the activations, of whatever kind they are by now."""
        return activation_modules(self.model, self.anatomy)

    def materialise(self, keep_graph: bool = False) -> None:
        """Write the effective weights into the model's parameters."""
        for shadow in self.layers.values():
            if keep_graph:
                with torch.enable_grad():
                    shadow._effective = shadow.effective()
                shadow.write(shadow._effective)
            else:
                with torch.no_grad():
                    shadow.write(shadow.effective())

    def trainable(self) -> tuple[list[Tensor], list[Tensor]]:
        """(weights with weight decay, all others) as leaves for an optimizer."""
        hidden = {id(shadow.parameter) for shadow in self.layers.values()}
        weights, others = [], []
        for shadow in self.layers.values():
            weights.append(shadow.dense.requires_grad_())
            shadow.parameter.requires_grad_()
            if shadow.learned.numel():
                others.append(shadow.learned.requires_grad_())
        others += [p for p in self.model.parameters() if id(p) not in hidden and p.is_floating_point()]
        return weights, others

    def backpropagate(self) -> None:
        """Hand the gradients of the model's parameters on to dense weights and learned parameters."""
        roots, gradients = [], []
        for shadow in self.layers.values():
            gradient = shadow.parameter_gradient()
            if gradient is not None and shadow._effective is not None:
                roots.append(shadow._effective)
                gradients.append(gradient)
                if self.regrows:
                    shadow.gradient = shadow.in_basis(gradient.detach().float())
        if roots:
            torch.autograd.backward(roots, gradients)
        for shadow in self.layers.values():
            shadow.parameter.grad = None
            shadow._effective = None

    # ------------------------------------------------------------ results

    def weights(self) -> Weights:
        """What the file stores."""
        self.materialise()
        plans = {s.key: Plan(s.masked().detach(), s.choice, s.learned.detach(), s.basis) for s in self.layers.values()}
        return Weights(self.model, plans)

    def state(self) -> dict[str, Tensor]:
        """Everything a child needs to go on from here: dense weights, norms, learned parameters."""
        state = tensors(self.model)
        for name, shadow in self.layers.items():
            state[shadow.key] = shadow.out_of_basis(shadow.dense.detach())
            if shadow.learned.numel():
                state[f"{_STEP}{name}|{shadow.choice}"] = shadow.learned.detach()
        return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def drawn_mask(weight: Tensor, targets: Mapping[str, Choice]) -> Tensor | None:
    """Bool, shape of `weight`: what stays of it; None if nothing is asked. targets: masking's dimension -> choice."""
    masks = [masking.mask(weight, choice) for masking, choice in asked(targets)]
    return functools.reduce(torch.logical_and, masks) if masks else None


def asked(targets: Mapping[str, Choice]) -> list[tuple[Masking, Choice]]:
    """The maskings that are asked for something."""
    return [(masking, targets[name]) for name, masking in maskings().items() if targets[name] != masking.default]


def activation_modules(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """Name in `model` -> module, of the original's activations and of what stands in for them."""
    known = origins(model)
    return {
        name: module
        for name, module in model.named_modules()
        if known[name] in anatomy.activations and known.get(name.rpartition(".")[0]) != known[name]
    }


def counted(chosen: Mapping[str, Choice], dimension: str, anatomy: Anatomy) -> dict[str, Choice]:
    """Shares of channels as numbers of channels, which also fit a pruned model; other choices as they are."""
    if dimension != "channels":
        return dict(chosen)
    return {g.name: kept_channels(g.channels, float(chosen[g.name])) for g in anatomy.groups if g.name in chosen}


def _assign_known(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Assign what both have: a child may have quantisers that its parent lacks, and the other way round."""
    own = tensors(model)
    assign(
        model,
        own | {key: value for key, value in state.items() if key in own and _fits(own[key], value)},
    )


def _fits(own: Tensor, value: Tensor) -> bool:
    return own.ndim == value.ndim and all(a >= b for a, b in zip(own.shape, value.shape, strict=True))
