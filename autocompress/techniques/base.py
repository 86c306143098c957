"""The protocol of a technique.

A technique is one file in this folder that ends with `register(...)`; nothing else is touched. It
says which dimension of the joint space it serves and which choices it offers, how it acts while the
candidate is fine-tuned, and how its result is stored and read back. The kinds, in the order in which
a recipe is applied:

- `StructureTechnique` changes the model once, before fine-tuning (channels, activation, activation
  bits). What tensors alone do not show is stored as the choice and `restore`d on load.
- `Transform`, `Masking` and `Coding` act on weight tensors. While fine-tuning, the weight that the model sees is
  `coding(masking(w))`, differentiable in `w` and in the learned parameters (straight-through
  estimator, Bengio et al., 2013). The file stores `Coding.encode` of the same function's result, so
  what is simulated and what is stored cannot drift apart. Where there is a transform, `w` are the coefficients of the
  weight in another basis, and the model sees the weight that they stand for.
- `TrainingTechnique` changes only how a candidate is pruned and fine-tuned.

Several codings share the dimension `weights`: each recognises its own choices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.model.anatomy import Anatomy
from autocompress.recipe import MODEL, Choice
from autocompress.space import dimensions, register_dimension
from autocompress.task import Calibration


class _Unrestricted:
    """Every choice can be had on every machine, everywhere, and voids nothing, unless a technique says otherwise."""

    sections: tuple[str, ...] = ("layers",)
    """Of a search space, in which it can be named: `layers`, `model`."""

    def available(self, choice: Choice) -> bool:
        """Whether this machine can do it; a choice that is not available is left out of the space."""
        return True

    def pays(self, choice: Choice) -> bool:
        """Whether this machine gains anything by it; if not, it is left out where others are offered."""
        return True

    def fits(self, choice: Choice, site: str, anatomy: Anatomy) -> bool:
        """Whether the part of the model at `site` can have it; if not, it is left out of the space there."""
        return True

    def voids(self, choice: Choice, site: str, dimension: str, other: str) -> bool:
        """Whether `choice` at `site` leaves nothing to choose in `dimension` at `other`."""
        return False


class Technique(_Unrestricted, ABC):
    """name: its dimension. default: the choice that changes nothing. voiding: whether a choice of it can leave
    others nothing to do (see `voids`)."""

    name: ClassVar[str]
    default: ClassVar[Choice]
    voiding: ClassVar[bool] = False

    @property
    @abstractmethod
    def about(self) -> str:
        """One line for people."""

    @abstractmethod
    def examples(self) -> Sequence[Choice]:
        """Choices to show to people, the default first."""

    def file_of(self, example: Choice) -> str:
        """Name of the module that offers this choice: its docstring documents it."""
        return type(self).__module__

    @abstractmethod
    def parse(self, raw: Any) -> Choice:
        """The choice meant by a YAML or CLI value; raises SpaceError naming what is offered."""

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        """Names of the parts of a model where the dimension exists."""


class StructureTechnique(Technique):
    """Changes the model itself, before fine-tuning.

    restores: whether a file must store the choice, so that `restore` can bring back what tensors alone
    do not show. permanent: what it took away does not come back while a candidate is trained on as
    another: the other's choice must follow from its own.
    """

    restores: ClassVar[bool] = True
    permanent: ClassVar[bool] = False

    @abstractmethod
    def apply(
        self,
        model: nn.Module,
        chosen: Mapping[str, Choice],
        run: Calibration,
        options: Mapping[str, Choice] | None = None,
    ) -> nn.Module:
        """`model`, changed in place, with the `chosen` (site -> choice); idempotent.

        `run(model)` runs it on a calibration batch. options: the recipe's choices for the whole model,
        dimension -> choice, for techniques that read one of them.
        """

    @abstractmethod
    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> nn.Module:
        """A fresh, unshaped `model`, changed in place to the structure of `chosen`, to be given its tensors."""

    def follows(self, before: Choice, after: Choice) -> bool:
        """Whether a candidate with `before` can go on as one with `after`; for permanent techniques."""
        return True


class Transform(Technique):
    """Another basis, orthonormal, for the grid that a row of weights lies on: a kernel, or the image that a layer
    reads. What is pruned, quantised and stored of such a layer are the coefficients of its weights (see `basis.py`).

    choice: its name in the dimension, which all transforms share. tag: the number that names it in a file; fixed for
    ever once released.
    """

    name: ClassVar[str] = "transform"
    default: ClassVar[Choice] = "none"
    about = "basis in which the weights of a layer that lie on an image, a signal or a kernel are pruned and stored"
    choice: ClassVar[str]
    tag: ClassVar[int]

    @abstractmethod
    def matrix(self, places: int) -> Tensor:
        """A row for each coefficient of a line of so many places, at most 64: float64 [places, places], orthonormal, in
        multiples of 2^-23, no row with more than eight that are not zero."""

    def examples(self) -> Sequence[Choice]:
        return (self.default, self.choice)

    def file_of(self, example: Choice) -> str:
        return type(self).__module__

    def parse(self, raw: Any) -> Choice:
        return str(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [layer.name for layer in anatomy.layers if layer.grid]


class Masking(Technique):
    """Sets weights to zero."""

    @abstractmethod
    def mask(self, weight: Tensor, choice: Choice) -> Tensor:
        """Bool, shape of `weight`: which weights stay."""


@dataclass(frozen=True)
class Coded:
    """A tensor as the file stores it.

    codes: int32 array in the shape of the tensor, entropy-coded; zero means the weight is zero.
    parameters: float32 values that are stored as they are (steps, code books).
    """

    codes: np.ndarray[Any, np.dtype[np.int32]]
    parameters: tuple[float, ...] = ()


class Coding(Technique):
    """Represents a tensor in fewer bits; the choices of several codings make one dimension.

    tag: the number that names the coding in a file; fixed for ever once released. repeats: whether rows
    of codes (places of the first dimension) are made to be equal; the file then holds each once.
    """

    name: ClassVar[str] = "weights"
    default: ClassVar[Choice] = "float32"
    about = "number format of the weights of a layer"
    tag: ClassVar[int]
    repeats: ClassVar[bool] = False

    @abstractmethod
    def choices(self) -> Sequence[Choice]:
        """The choices that are this coding's, from the lightest to the heaviest."""

    @abstractmethod
    def bits(self, choice: Choice) -> float:
        """Bits of a weight before entropy coding."""

    @abstractmethod
    def parameters(self, choice: Choice, shape: tuple[int, ...]) -> int:
        """How many learned parameters P a tensor of this shape has; 0 for formats that need none."""

    def stored(self, choice: Choice, shape: tuple[int, ...]) -> int:
        """How many of these the file stores; the codes hold the rest."""
        return self.parameters(choice, shape)

    @abstractmethod
    def initial(self, weight: Tensor, choice: Choice, clipping: str = "mse") -> Tensor:
        """Learned parameters, float32 [P], fitted to `weight`. clipping: by which criterion, where the
        coding has a choice (see `clipping.py`)."""

    @abstractmethod
    def simulate(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        """The weight as it will be read back, float32, differentiable."""

    @abstractmethod
    def layout(self, choice: Choice) -> tuple[int, int]:
        """(exponent, mantissa) bits when codes are the bit patterns of floats; (0, b) when they are
        signed integers of at most 2^b in magnitude."""

    @abstractmethod
    def encode(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Coded:
        """What the file stores; `decode` of it equals `simulate` bit for bit."""

    @abstractmethod
    def decode(self, coded: Coded, choice: Choice) -> Tensor:
        """float32 tensor in the shape of `coded.codes`."""

    def examples(self) -> Sequence[Choice]:
        return self.choices()

    def parse(self, raw: Any) -> Choice:
        return str(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [layer.name for layer in anatomy.layers]


class Steps(NamedTuple):
    """Values that weights may have: code times size, codes from `low` to `high`. size: broadcasts to the weight."""

    size: Tensor
    low: int
    high: int


class IntegerCoding(Coding):
    """A coding whose codes are integers (its `layout` has no exponent), so that their bits can be priced."""

    @abstractmethod
    def scaled(self, weight: Tensor, choice: Choice, parameters: Tensor) -> Tensor:
        """The weight in units of its integer code, before rounding; differentiable."""

    def steps(self, choice: Choice, parameters: Tensor, dimensions: int) -> Steps | None:
        """Of a tensor of so many dimensions, float32; None where the values of codes are no multiples."""
        return None


@dataclass(frozen=True)
class IntegerWeights:
    """A fine-tuned layer before its last rounding.

    scaled: float32, the weight in units of its integer code. sensitivity: float32 of the same shape, the
    estimated rise of the loss (nats) by a rounding error of one code, times the number of weights of the
    original model. bits: float32 [largest magnitude + 1], what the entropy coder needs for each.
    """

    scaled: Tensor
    sensitivity: Tensor
    bits: Tensor


@dataclass(frozen=True)
class SparseLayer:
    """A layer that is pruned by share: weight, float32; share of zeros asked of it; bits of a weight that stays."""

    weight: Tensor
    zeros: float
    bits: float


class Term(AbstractContextManager[Any]):
    """A part of the loss, for the length of one fine-tuning; entered around each forward pass."""

    def __exit__(self, *error: object) -> None:
        """The forward pass is over."""

    @abstractmethod
    def loss(self, divergence: Tensor) -> Tensor:
        """Scalar that is added to the loss of a batch, after its forward pass. divergence: scalar, of the
        outputs from the original model's (see `training.divergence`)."""


class TrainingTechnique(Technique):
    """A choice for the whole model: how a candidate is pruned and fine-tuned, not what its recipe asks of a layer."""

    sections = ("model",)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [MODEL]

    def autocast(self, choice: Choice, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def penalty(self, choice: Choice) -> float:
        """Price of the estimated rate in the loss, or when weights are rounded without training: nats that half the
        bits of all layers are worth."""
        return 0.0

    def learning_rate_factor(self, choice: Choice) -> float:
        """Of the peak learning rate."""
        return 1.0

    def term(self, choice: Choice, activations: Sequence[nn.Module]) -> Term | None:
        """A new part of the loss. activations: the candidate's activation modules."""
        return None

    def exchanged(self, choice: Choice, layers: Sequence[SparseLayer]) -> list[float]:
        """Shares of zeros of these layers, which may be exchanged between them at equal bits."""
        return [layer.zeros for layer in layers]

    def regrown(self, choice: Choice, mask: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
        """Bool, as `mask`: with up to `share` of the weights that stay exchanged for others.

        weight: float32, zero where it was pruned. gradient: float32, of all weights, also the pruned.
        """
        return mask

    def settle(self, choice: Choice, weights: IntegerWeights) -> Tensor:
        """Integer codes as float32, shape of `weights.scaled`: the rounding that the file will store.
        Called once after fine-tuning, when `choice` is not the default."""
        return weights.scaled.round()


class _SharedDimension(_Unrestricted):
    """The dimension of several techniques. first: one of them. known: gives the choices of all."""

    voiding = False

    def __init__(self, first: Technique, known: Callable[[], Iterable[Choice]]) -> None:
        self.name, self.default, self.about, self.sites = first.name, first.default, first.about, first.sites
        self._known = known

    def parse(self, raw: Any) -> Choice:
        if raw not in self._known():
            raise SpaceError(f"choice {raw!r} does not exist; choose from {', '.join(map(str, self._known()))}")
        return str(raw)


class _Vectors(_SharedDimension):
    """The formats of weights once more, for the rest of the model."""

    sections = ("model",)

    def __init__(self, first: Technique, known: Callable[[], Iterable[Choice]]) -> None:
        super().__init__(first, known)
        self.name, self.sites = "vectors", lambda anatomy: [MODEL]
        self.about = "number format of biases, norms and everything that is not a layer's weight"


_STRUCTURES: dict[str, StructureTechnique] = {}
_TRANSFORMS: dict[Choice, Transform] = {}
_MASKINGS: dict[str, Masking] = {}
_CODINGS: dict[int, Coding] = {}
_TRAININGS: dict[str, TrainingTechnique] = {}


def register(technique: Technique) -> None:
    """Make a technique known: its dimension can be searched, its results stored and read back."""
    if isinstance(technique, Coding):
        if technique.tag in _CODINGS:
            raise ValueError(f"coding tag {technique.tag} is taken by {_CODINGS[technique.tag]}")
        _CODINGS[technique.tag] = technique
        if technique.name not in dimensions():
            register_dimension(_SharedDimension(technique, coding_choices))
            register_dimension(_Vectors(technique, coding_choices))
        return
    if isinstance(technique, Transform):
        if transform_tagged(technique.tag) is not None:
            raise ValueError(f"transform tag {technique.tag} is taken by {transform_tagged(technique.tag)}")
        _TRANSFORMS[technique.choice] = technique
        if technique.name not in dimensions():
            register_dimension(_SharedDimension(technique, lambda: (Transform.default, *_TRANSFORMS)))
        return
    register_dimension(technique)
    if isinstance(technique, StructureTechnique):
        _STRUCTURES[technique.name] = technique
    elif isinstance(technique, Masking):
        _MASKINGS[technique.name] = technique
    elif isinstance(technique, TrainingTechnique):
        _TRAININGS[technique.name] = technique


def techniques() -> Sequence[Technique]:
    """All of them."""
    by_kind = _STRUCTURES, _TRANSFORMS, _MASKINGS, _CODINGS, _TRAININGS
    return [technique for known in by_kind for technique in known.values()]


def structures() -> Mapping[str, StructureTechnique]:
    return _STRUCTURES


def maskings() -> Mapping[str, Masking]:
    return _MASKINGS


def trainings() -> Mapping[str, TrainingTechnique]:
    return _TRAININGS


_TRAINS = ("autocast", "learning_rate_factor", "term", "regrown", "settle")


def only_trains(dimension: str) -> bool:
    """Whether it is that of a technique that acts by fine-tuning alone."""
    kind, general = type(_TRAININGS.get(dimension)), TrainingTechnique
    return dimension in _TRAININGS and any(getattr(kind, name) is not getattr(general, name) for name in _TRAINS)


def transforms() -> Mapping[Choice, Transform]:
    """Choice -> the transform."""
    return _TRANSFORMS


def transform_tagged(tag: int) -> Transform | None:
    return next((transform for transform in _TRANSFORMS.values() if transform.tag == tag), None)


def coding_choices() -> dict[Choice, Coding]:
    """Choice -> the coding that offers it, from the lightest to the heaviest."""
    offered = [(choice, coding) for coding in _CODINGS.values() for choice in coding.choices()]
    return dict(sorted(offered, key=lambda pair: -pair[1].bits(pair[0])))


def coding_of(choice: Choice) -> Coding:
    return coding_choices()[choice]


def coding_tagged(tag: int) -> Coding | None:
    return _CODINGS.get(tag)


def straight_through(value: Tensor, weight: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of `weight` (Bengio et al., 2013)."""
    return value.detach() + (weight - weight.detach())


def number_in(raw: Any, low: float, high: float, what: str) -> float:
    """`raw` as a float within [low, high], or a SpaceError that says what is expected."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not low <= raw <= high:
        raise SpaceError(f"choice {raw!r} does not exist; {what} from {low:g} to {high:g}")
    return float(raw)
