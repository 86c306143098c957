"""How channels of different groups compete: each group for itself, or all with one another.

`local`: every group loses the share that its own choice asks for. `global`: the choices only say how many weights go
in all; they are taken where a channel's importance, relative to the mean of its group, is least for its weights
(one global ranking of normalised criteria, Molchanov et al., CVPR 2019).

Not for a model with one group of channels, which has nothing to compete with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocompress.errors import SpaceError
from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, register


class Ranking(TrainingTechnique):
    """A choice for the whole model; it acts when channels are removed (see `channels.py`)."""

    name = "ranking"
    default = "local"
    about = "whether channels compete within their group (local) or with all others (global)"

    def examples(self) -> Sequence[Choice]:
        return ("local", "global")

    def parse(self, raw: Any) -> Choice:
        if raw not in ("local", "global"):
            raise SpaceError(f"choice {raw!r} does not exist; choose from local, global")
        return str(raw)


register(Ranking())
