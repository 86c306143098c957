"""What can be compressed of a model, and what a search space offers for it, as tables."""

from __future__ import annotations

from rich.table import Table

from autocompress.model.anatomy import Anatomy
from autocompress.space import BoundSpace


def inspection_tables(task: str, anatomy: Anatomy, space_name: str, space: BoundSpace) -> list[Table]:
    """Of the layers, of the groups of channels, and of the dimensions of `space`, which is bound to the model."""
    layers = _table(f"{task}: {len(anatomy.layers)} layers", "layer", "kind", "shape", "weights", "channel groups")
    for layer in anatomy.layers:
        shape, groups = " x ".join(map(str, layer.shape)), ", ".join(dict(layer.groups))
        layers.add_row(layer.name, layer.kind, shape, f"{layer.numel:,}", groups)
    title = f"{len(anatomy.groups)} groups of channels that are removed together"
    channels = _table(title, "group", "channels", "reaches")
    for group in anatomy.groups:
        channels.add_row(group.name, str(group.channels), ", ".join(group.members))
    dimensions = _table(f"space {space_name!r}: {len(space)} dimensions", "dimension", "choices", "sites")
    merged: dict[tuple[str, str], list[str]] = {}
    for d in space:
        merged.setdefault((d.name, ", ".join(map(str, d.choices))), []).append(d.site)
    every = {
        tuple(group.name for group in anatomy.groups): "every group of channels",
        tuple(layer.name for layer in anatomy.layers): "every layer",
    }
    for (name, choices), sites in merged.items():
        dimensions.add_row(name, choices, every.get(tuple(sites)) or ", ".join(sites))
    return [layers, channels, dimensions]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name in ("weights", "channels") else "left", overflow="fold")
    return table
