"""Structure: another module in place of a layer, of a block or of the whole model.

Other files of this folder `offer` what may stand there. Layers are named as everywhere; a block by the
name of its module; the whole model by `model`, in that section of a space.

Not for modules that run more than once or not at all, and those that share a weight with a module outside.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from autocompress.errors import SpaceError
from autocompress.model.anatomy import Anatomy, Block
from autocompress.model.replacement import Replacement, replaced
from autocompress.recipe import MODEL, Choice
from autocompress.task import Calibration
from autocompress.techniques.base import StructureTechnique, register

_KEEP = "keep"


class Structure(ABC):
    """One way to rebuild a module. pattern: of its choices. example: how people read of it."""

    pattern: ClassVar[str]
    example: ClassVar[str]
    keeps_channels: ClassVar[bool] = True
    """Whether channels, activations and their bits can still be chosen for what is inside."""
    keeps_layers: ClassVar[bool] = True

    @abstractmethod
    def check(self, choice: str) -> None:
        """Raise ValueError when the number in `choice` makes no sense."""

    @abstractmethod
    def fits(self, choice: str, block: Block, anatomy: Anatomy) -> bool:
        """Whether `block` can be rebuilt so, and has fewer weights then."""

    @abstractmethod
    def build(self, model: nn.Module, name: str, choice: str, run: Calibration) -> Replacement:
        """What stands in for the trained module `name` ("": all of `model`), initialised from it."""

    @abstractmethod
    def blank(self, module: nn.Module, choice: str) -> Replacement:
        """The same with tensors of any value and shape, to be assigned."""

    def follows(self, before: str, after: str) -> bool:
        """Whether `build` can make `after` of what it made for `before`."""
        return False


_OFFERS: list[Structure] = []


def offer(structure: Structure) -> None:
    _OFFERS.append(structure)


def _structure(choice: Choice) -> Structure:
    for structure in _OFFERS:
        if re.fullmatch(structure.pattern, str(choice)):
            structure.check(str(choice))
            return structure
    raise ValueError(choice)


class Structures(StructureTechnique):
    name = "structure"
    default = _KEEP
    permanent = voiding = True
    sections = ("layers", "model")

    @property
    def about(self) -> str:
        offered = ", ".join(structure.example for structure in _OFFERS)
        return f"what stands in place of a layer, of a block or of the whole model: {_KEEP}, or {offered}"

    def examples(self) -> Sequence[Choice]:
        return (_KEEP, *(structure.example for structure in _OFFERS))

    def file_of(self, example: Choice) -> str:
        return __name__ if example == _KEEP else type(_structure(example)).__module__

    def parse(self, raw: Any) -> Choice:
        try:
            if raw != _KEEP:
                _structure(raw)
        except ValueError:
            offered = ", ".join(structure.example for structure in _OFFERS)
            raise SpaceError(f"choice {raw!r} does not exist; choose from {_KEEP}, {offered}") from None
        return str(raw)

    def sites(self, anatomy: Anatomy) -> Sequence[str]:
        return [block.name or MODEL for block in anatomy.blocks]

    def fits(self, choice: Choice, site: str, anatomy: Anatomy) -> bool:
        block = next((block for block in anatomy.blocks if (block.name or MODEL) == site), None)
        return choice == _KEEP or (block is not None and _structure(choice).fits(str(choice), block, anatomy))

    def voids(self, choice: Choice, site: str, dimension: str, other: str) -> bool:
        """What is gone has no choices; what is stacked has the widths and the functions of its stack; and
        what stands in place of a module stands in place of all inside."""
        if choice == _KEEP or (other == site and dimension == self.name):
            return False
        inside = other != MODEL if site == MODEL else other == site or other.startswith(f"{site}.")
        structure = _structure(choice)
        if not inside or dimension == self.name:
            return inside
        return not structure.keeps_layers or (
            not structure.keeps_channels and dimension in ("channels", "activation", "activation_bits")
        )

    def apply(
        self,
        model: nn.Module,
        chosen: Mapping[str, Choice],
        run: Calibration,
        options: Mapping[str, Choice] | None = None,
    ) -> nn.Module:
        for name, choice in _rebuilt(chosen):
            if getattr(model.get_submodule(name), "choice", None) != choice:
                model = _put(model, name, _structure(choice).build(model, name, choice, run), choice)
        return model

    def restore(self, model: nn.Module, chosen: Mapping[str, Choice]) -> nn.Module:
        for name, choice in _rebuilt(chosen):
            model = _put(model, name, _structure(choice).blank(model.get_submodule(name), choice), choice)
        return model

    def follows(self, before: Choice, after: Choice) -> bool:
        if before in (after, _KEEP):
            return True
        return after != _KEEP and _structure(after).follows(str(before), str(after))


def _rebuilt(chosen: Mapping[str, Choice]) -> list[tuple[str, str]]:
    """(name of the module, choice) of what is not kept."""
    return [("" if site == MODEL else site, str(choice)) for site, choice in chosen.items() if choice != _KEEP]


def _put(model: nn.Module, name: str, new: Replacement, choice: str) -> nn.Module:
    new.choice = choice
    return replaced(model, name, new)


register(Structures())
