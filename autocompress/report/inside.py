"""What is inside a file: where its bytes go, and how two files differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from autocompress.artifact import Artifact, StoredTensor
from autocompress.model.anatomy import layer_name

BAR = 12
VECTORS, HEADER = "vectors", "header"


@dataclass(frozen=True)
class Part:
    """A layer of a file; or all its vectors together, or its header. zeros: share, 0 to 1."""

    name: str
    size_bytes: int
    stored_as: str = ""
    shape: tuple[int, ...] = ()
    zeros: float = 0.0
    also: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits of the stream for each weight, pruned ones included; 0 for what is not a layer."""
        return 8 * self.size_bytes / max(math.prod(self.shape), 1) if self.shape else 0.0

    @property
    def zeros_in_words(self) -> str:
        """Percent; empty for a header, and for vectors that have none."""
        return f"{100 * self.zeros:.0f}%" if self.shape or self.zeros else ""

    @property
    def dimensions(self) -> str:
        return "x".join(map(str, self.shape))


def parts(artifact: Artifact) -> list[Part]:
    """Layers in the order of the file, then vectors and header; their bytes add up to the file."""
    out = []
    rest, zeros, values = 0, 0.0, 0
    formats: dict[str, None] = {}
    for name, tensor in artifact.tensors.items():
        if tensor.value.ndim < 2:
            rest += tensor.size_bytes
            zeros += _zeros(tensor) * tensor.value.numel()
            values += tensor.value.numel()
            if tensor.value.ndim == 1:
                formats[str(tensor.choice)] = None
            continue
        out.append(_layer(artifact, layer_name(name), tensor))
    vectors = Part(VECTORS, rest, ", ".join(formats), zeros=zeros / max(values, 1))
    return [*out, vectors, Part(HEADER, artifact.header_bytes)]


def _layer(artifact: Artifact, name: str, tensor: StoredTensor) -> Part:
    choices = [f"{dimension} {choice}" for site, dimension, choice in artifact.recipe if site == name]
    shape = tuple(tensor.value.shape)
    if tensor.basis:
        choices.insert(0, f"{tensor.basis.transform.name} {tensor.basis.transform.choice}")
    return Part(name, tensor.size_bytes, str(tensor.choice), shape, _zeros(tensor), ", ".join(choices))


def _zeros(tensor: StoredTensor) -> float:
    """Share of what is stored, 0 to 1. A constant is one value in memory, whatever its shape."""
    values = tensor.coded.flatten()[:1] if tensor.choice == "constant" else tensor.coded
    return 1 - int(values.count_nonzero()) / max(values.numel(), 1)


def inside_table(artifact: Artifact, title: str) -> Table:
    """One row a part: shape, format, zeros, bytes, bits per weight, and its share of the file as a bar."""
    table = Table(title=f"{title}: {artifact.size_bytes:,} bytes", title_justify="left")
    for name in ("layer", "shape", "stored as", "zeros", "bytes", "bits/w"):
        words = name in ("layer", "shape", "stored as")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    table.add_column("share", no_wrap=True, min_width=BAR)
    for part in parts(artifact):
        layer = bool(part.shape)
        table.add_row(
            part.name,
            part.dimensions,
            ", ".join(filter(None, (part.stored_as, part.also))),
            part.zeros_in_words,
            f"{part.size_bytes:,}",
            f"{part.bits_per_weight:.2f}" if layer else "",
            "█" * math.ceil(BAR * part.size_bytes / artifact.size_bytes),
        )
    elsewhere = {part.name for part in parts(artifact)}
    others = [f"{site} {dimension} {choice}" for site, dimension, choice in artifact.recipe if site not in elsewhere]
    if others:
        table.caption, table.caption_justify = "also: " + ", ".join(others), "left"
    return table


def differences(one: Artifact, other: Artifact) -> Iterator[tuple[Part | None, Part | None]]:
    """Pairs of parts of the same name, in the order of `one`; None where a file lacks the part."""
    left = {part.name: part for part in parts(one)}
    right = {part.name: part for part in parts(other)}
    for name in dict.fromkeys([*left, *right]):
        yield left.get(name), right.get(name)


def difference_table(one: Artifact, other: Artifact, names: tuple[str, str]) -> Table:
    """Each part in `one` and, below it, in `other`; what is the same in both appears once."""
    table = Table(title=f"{names[0]}\n{names[1]}", title_justify="left", show_lines=True)
    for name in ("layer", "shape", "stored as", "zeros", "bytes", "change"):
        numbers = name in ("zeros", "bytes", "change")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for a, b in differences(one, other):
        a, b = a or Part(b.name if b else "", 0), b or Part(a.name if a else "", 0)
        table.add_row(
            a.name,
            _both(a.dimensions, b.dimensions),
            _both(a.stored_as, b.stored_as),
            _both(a.zeros_in_words, b.zeros_in_words),
            _both(f"{a.size_bytes:,}", f"{b.size_bytes:,}"),
            f"{b.size_bytes - a.size_bytes:+,}",
        )
    change = other.size_bytes / one.size_bytes - 1
    total = _both(f"{one.size_bytes:,}", f"{other.size_bytes:,}")
    table.add_row("file", "", "", "", total, f"{100 * change:+,.1f}%", style="bold")
    return table


def _both(before: str, after: str) -> str:
    return before if before == after else f"{before or '-'}\n{after or '-'}"
