"""Removing whole layers and blocks: what goes in comes out.

Residual networks behave like ensembles of paths and lose little with one of their blocks (Veit et al.,
NeurIPS 2016); so do deep transformers with layers (Fan et al., LayerDrop, ICLR 2020). Possible where the
output has the shape of the input, however channels are pruned.

Not for modules whose output has another shape than their input, or would have once channels are pruned.
"""

from __future__ import annotations

from torch import nn

from autocompress.model.anatomy import Anatomy, Block
from autocompress.model.replacement import Dropped, Replacement
from autocompress.task import Calibration
from autocompress.techniques.structure import Structure, offer


class Drop(Structure):
    pattern, example = "drop", "drop"
    keeps_channels = keeps_layers = False

    def check(self, choice: str) -> None: ...

    def fits(self, choice: str, block: Block, anatomy: Anatomy) -> bool:
        return block.droppable

    def build(self, model: nn.Module, name: str, choice: str, run: Calibration) -> Replacement:
        return Dropped()

    def blank(self, module: nn.Module, choice: str) -> Replacement:
        return Dropped()

    def follows(self, before: str, after: str) -> bool:
        return True


offer(Drop())
