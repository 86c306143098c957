"""The `.acz` file: parse and write, without a model. The format is described in docs/format.md.

    magic "\\x89ACZ" | version u8 | CRC-32 of the rest u32 | header length varint | entropy-coded stream

The stream holds the header first (names, shapes, codings, steps and the recipe), then the tensors.
Nothing in a file is executed, and no allocation is larger than the sizes that the file declares and the
reader has checked.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.artifact.basis import Basis
from autocompress.artifact.coder import MAX_WEIGHTS_PER_BYTE, CoderState
from autocompress.artifact.codes import read_codes, write_codes
from autocompress.errors import ArtifactError
from autocompress.recipe import Choice, Recipe
from autocompress.techniques.base import Coded, Coding, coding_of, coding_tagged, transform_tagged

MAGIC = b"\x89ACZ"
VERSION = 2
"""Of files with transformed tensors; those without are of version 1, as they always were."""
_PREFIX = struct.Struct("<4sBI")
_MAX_RANK = 8
_EMPTY = torch.empty(0)
_CONSTANT, _RAW, _CODED = range(3)
"""Kinds of tensors; coded ones are _CODED + choice + _CHOICES x tag of the coding."""
_CHOICES = 32
Codes = np.ndarray[Any, np.dtype[np.int32]]
_RAW_TYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.complex64,
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    value: as decoded; float32, or the integer type it was stored in. choice: number format it was
    coded in ("constant" and "raw" for tensors that need none; a constant is one element, expanded).
    size_bytes: bytes of the entropy-coded stream that it takes (headers are counted apart).
    parameters: of its coding. coefficients: what was coded, if `value` is made of that by a transform, which is that of
    `basis`.
    """

    value: Tensor
    choice: Choice
    size_bytes: int = 0
    parameters: tuple[float, ...] = ()
    coefficients: Tensor | None = None
    basis: Basis | None = None

    @property
    def coded(self) -> Tensor:
        """What the file holds: the coefficients, or else the value."""
        return self.value if self.coefficients is None else self.coefficients


@dataclass(frozen=True)
class Plan:
    """A tensor to be written: `value` coded by `choice` with the learned `parameters`; in `basis`, if it has one."""

    value: Tensor
    choice: Choice
    parameters: Tensor = _EMPTY
    basis: Basis | None = None


@dataclass(frozen=True)
class Artifact:
    """A parsed file: what it holds, without a model.

    tensors: name -> tensor. recipe: the choices that it stores. header_bytes: everything but the streams.
    """

    recipe: Recipe
    tensors: dict[str, StoredTensor]
    header_bytes: int
    size_bytes: int


def decoded(plan: Plan) -> Tensor:
    """The values that a reader will get, in the plan's basis, without writing them; on the device of the plan's."""
    if not plan.value.is_floating_point():
        return plan.value
    coding = coding_of(plan.choice)
    return coding.decode(coding.encode(plan.value.float(), plan.choice, plan.parameters), plan.choice).to(
        plan.value.device
    )


# ------------------------------------------------------------------------------------- write


def encode_artifact(plans: dict[str, Plan], recipe: Recipe) -> bytes:
    """The bytes of a file that decodes to `plans`; bit-exact (see `Coding`)."""
    plans = {
        n: replace(p, value=p.value.detach().cpu(), parameters=p.parameters.detach().cpu()) for n, p in plans.items()
    }
    values = {name: plan.value for name, plan in plans.items()}
    coded: dict[str, tuple[Coding, Choice, Coded]] = {}
    kinds = []
    for name, value in values.items():
        same = bool(value.numel()) and bool((value == value.flatten()[0]).all())
        if same and (plans[name].basis is None or not value.any()):  # of nothing every transform makes nothing
            kinds.append(_CONSTANT)
            values[name] = decoded(plans[name])
        elif not value.numel() or not value.is_floating_point() or value.dtype == torch.float64:
            kinds.append(_RAW)
        else:
            coding, choice = coding_of(plans[name].choice), plans[name].choice
            kinds.append(_CODED + coding.choices().index(choice) + _CHOICES * coding.tag)
            coded[name] = coding, choice, _coded(name, value.float(), plans[name])
    state = CoderState()
    bases = [plans[name].basis if name in coded else None for name in plans]
    header = _header(values, kinds, bases, [tensor for _, _, tensor in coded.values()], recipe)
    state.code_text(np.frombuffer(header, np.uint8).copy())
    for coding, choice, tensor in coded.values():
        write_codes(state, tensor.codes, *coding.layout(choice), coding.repeats)
    length = _Writer()
    length.varint(len(header))
    body = bytes(length.data) + state.finish()
    return MAGIC + struct.pack("<BI", VERSION if any(bases) else 1, zlib.crc32(body)) + body


def _coded(name: str, value: Tensor, plan: Plan) -> Coded:
    if not bool(torch.isfinite(value).all()):
        raise ArtifactError(f"tensor {name!r} holds values that are not finite: it cannot be stored")
    return coding_of(plan.choice).encode(value, plan.choice, plan.parameters)


def _header(
    values: dict[str, Tensor], kinds: list[int], bases: list[Basis | None], coded: list[Coded], recipe: Recipe
) -> bytes:
    """Column by column: names, dimensions, kinds, transforms, parameters, raw values, recipe."""
    writer = _Writer()
    writer.varint(len(values))
    writer.blob("\n".join(values).encode())
    shapes = [tuple(value.shape) for value in values.values()]
    for shape in shapes:
        writer.varint(len(shape))
    guess = _Guess([len(shape) for shape in shapes])
    for place, i in guess.order():
        size = shapes[i][place]
        writer.varint(0 if size == guess.size else size + 1)
        guess.take(place, i, size)
    for kind in kinds:
        writer.varint(kind)
    for basis in itertools.compress(bases, _may_be_transformed(shapes, kinds)) if any(bases) else ():
        writer.varint(basis.transform.tag + 1 if basis else 0)
        if basis and basis.width:
            writer.varint(basis.width)
    parameters = np.array([p for tensor in coded for p in tensor.parameters], "<f4")
    writer.data += parameters.view(np.uint8).reshape(-1, 4).T.tobytes()
    for value, kind in zip(values.values(), kinds, strict=True):
        if kind < _CODED:
            _write_raw(writer, value.flatten()[:1] if kind == _CONSTANT else value)
    _write_recipe(writer, recipe, list(values))
    return bytes(writer.data)


def _may_be_transformed(shapes: list[tuple[int, ...]], kinds: list[int]) -> list[bool]:
    return [kind >= _CODED and len(shape) > 1 for shape, kind in zip(shapes, kinds, strict=True)]


class _Guess:
    """Predicts the dimensions of tensors from those before: most of a header's dimensions are no news.

    A first dimension is that of the tensor before; a second one the first of the last tensor of two
    dimensions or more; a later one that of the last tensor that has it.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.shapes: list[list[int]] = [[] for _ in ranks]
        self._last = 0

    def order(self) -> Iterator[tuple[int, int]]:
        """(place, tensor) in the order in which they are written."""
        for place in range(max(self.ranks, default=0)):
            self._last = 0
            for i, rank in enumerate(self.ranks):
                if place < rank:
                    yield place, i
                if place == 1 and rank > 1:
                    self._last = self.shapes[i][0]

    @property
    def size(self) -> int:
        return self._last

    def take(self, place: int, i: int, size: int) -> None:
        self.shapes[i].append(size)
        if place != 1:
            self._last = size


def _write_raw(rest: _Writer, value: Tensor) -> None:
    if value.dtype in (torch.float32, torch.float16, torch.bfloat16):
        rest.varint(len(_RAW_TYPES))
        rest.data += value.float().contiguous().numpy().tobytes()
        return
    if value.dtype not in _RAW_TYPES:
        raise ArtifactError(f"tensors of type {value.dtype} cannot be stored")
    rest.varint(_RAW_TYPES.index(value.dtype))
    rest.data += value.contiguous().numpy().tobytes()


def _write_recipe(writer: _Writer, recipe: Recipe, names: list[str]) -> None:
    """Sites that are layers are named by their tensor's place in the file, equal choices together."""
    groups: dict[tuple[str, Choice], list[str]] = {}
    for site, dimension, choice in recipe:
        groups.setdefault((dimension, choice), []).append(site)
    writer.varint(len(groups))
    place = {name.removesuffix(".weight"): i for i, name in enumerate(names)}
    for (dimension, choice), sites in groups.items():
        kind = "sif"[[str, int, float].index(type(choice))]
        writer.blob(f"{dimension}\0{kind}{choice}".encode())
        writer.varint(len(sites))
        for site in sites:
            writer.varint(place.get(site, len(names)))
            if site not in place:
                writer.blob(site.encode())


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()

    def varint(self, value: int) -> None:
        while value > 127:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def blob(self, data: bytes) -> None:
        self.varint(len(data))
        self.data += data


# -------------------------------------------------------------------------------------- read


def read_artifact(path: str | Path) -> Artifact:
    """Parse a `.acz` file. Raises ArtifactError when it is missing, foreign, newer or damaged."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return decode_artifact(data, str(path))


def decode_artifact(data: bytes, where: str = "artifact") -> Artifact:
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise ArtifactError(f"{where} is not an autocompress artifact (.acz)")
    _, version, checksum = _PREFIX.unpack_from(data)
    if version > VERSION:
        raise ArtifactError(
            f"{where} has format version {version}, this release reads up to {VERSION}: upgrade autocompress"
        )
    if version == 0 or zlib.crc32(data[_PREFIX.size :]) != checksum:
        raise ArtifactError(f"{where} is damaged: its checksum does not match")
    start = _Reader(data[_PREFIX.size :], where)
    length = start.varint()
    stream = start.data[start.at :]
    if length > 64 * len(stream) + 4096:
        raise ArtifactError(f"{where} is damaged: its header is longer than its length can hold")
    header = np.zeros(length, np.uint8)
    state = CoderState(stream)
    state.code_text(header)
    tensors, recipe = _Reader(header.tobytes(), where).artifact(state, len(stream), version)
    spent = sum(tensor.size_bytes for tensor in tensors.values())
    return Artifact(recipe, tensors, len(data) - spent, len(data))


class _Reader:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.at, self.where = data, 0, where

    def broken(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.where} is damaged: {what}")

    def take(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise self.broken("its header ends too early")
        self.at += length
        return self.data[self.at - length : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 56:
                raise self.broken("a number in its header is too large")

    def text(self) -> str:
        try:
            return self.take(self.varint()).decode()
        except UnicodeDecodeError as error:
            raise self.broken("a name is not text") from error

    def artifact(self, state: CoderState, length: int, version: int) -> tuple[dict[str, StoredTensor], Recipe]:
        count = self.varint()
        text = self.text()
        names = text.split("\n") if count else []
        if len(names) != count or len(set(names)) != count:
            raise self.broken("names of tensors are missing or double")
        shapes = self.shapes(names)
        kinds = [self.varint() for _ in names]
        self.bound(shapes, kinds, length)
        bases = self.bases(names, shapes, kinds) if version > 1 else {}
        codings = iter(self.codings(kinds, shapes))
        plain = {
            name: self.plain(name, shape, kind)
            for name, shape, kind in zip(names, shapes, kinds, strict=True)
            if kind < _CODED
        }
        recipe = self.recipe(names)
        if self.at != len(self.data):
            raise self.broken("its header is longer than its content")
        tensors = {
            name: plain[name] if name in plain else self.decode(state, shape, *next(codings))
            for name, shape in zip(names, shapes, strict=True)
        }
        if not length <= state.position <= length + 8:
            raise self.broken("its stream has another length than its tensors")
        for name, basis in bases.items():
            coefficients = tensors[name].value
            tensors[name] = replace(
                tensors[name], value=basis.read(coefficients), coefficients=coefficients, basis=basis
            )
        return tensors, recipe

    def shapes(self, names: list[str]) -> list[tuple[int, ...]]:
        ranks = [self.varint() for _ in names]
        for name, rank in zip(names, ranks, strict=True):
            if rank > _MAX_RANK:
                raise self.broken(f"tensor {name!r} has {rank} dimensions")
        guess = _Guess(ranks)
        for place, i in guess.order():
            number = self.varint()
            guess.take(place, i, number - 1 if number else guess.size)
        for name, shape in zip(names, guess.shapes, strict=True):
            if max(shape, default=0) >= 1 << 31 or math.prod(shape) >= 1 << 40:
                raise self.broken(f"tensor {name!r} has an impossible shape")
        return [tuple(shape) for shape in guess.shapes]

    def bound(self, shapes: list[tuple[int, ...]], kinds: list[int], length: int) -> None:
        """No allocation before the declared sizes are known to be possible."""
        counts = [(math.prod(shape), kind) for shape, kind in zip(shapes, kinds, strict=True)]
        if any(count == 0 and kind != _RAW for count, kind in counts):
            raise self.broken("a coded tensor is empty")
        coded = sum(count for count, kind in counts if kind >= _CODED)
        raw = sum(count for count, kind in counts if kind == _RAW)
        if coded > MAX_WEIGHTS_PER_BYTE * (length + 64) or raw > len(self.data):
            raise self.broken("it declares more weights than its length can hold")

    def bases(self, names: list[str], shapes: list[tuple[int, ...]], kinds: list[int]) -> dict[str, Basis]:
        bases = {}
        for name, shape in itertools.compress(zip(names, shapes, strict=True), _may_be_transformed(shapes, kinds)):
            number = self.varint()
            if number:
                transform, width = transform_tagged(number - 1), self.varint() if len(shape) == 2 else 0
                if transform is None or (len(shape) == 2 and (not width or shape[1] % width)):
                    raise self.broken(f"tensor {name!r} has a transform that is unknown or does not fit")
                bases[name] = Basis(transform, width)
        return bases

    def codings(
        self, kinds: list[int], shapes: list[tuple[int, ...]]
    ) -> list[tuple[Coding, Choice, tuple[float, ...]]]:
        codings, lengths = [], []
        for kind, shape in zip(kinds, shapes, strict=True):
            if kind >= _CODED:
                tag, index = divmod(kind - _CODED, _CHOICES)
                coding = coding_tagged(tag)
                if coding is None or index >= len(coding.choices()):
                    raise self.broken("a tensor has an unknown coding")
                codings.append((coding, coding.choices()[index]))
                lengths.append(coding.stored(coding.choices()[index], shape))
        planes = np.frombuffer(self.take(4 * sum(lengths)), np.uint8).reshape(4, -1)
        values = iter(np.ascontiguousarray(planes.T).view("<f4").ravel().tolist())
        return [
            (coding, choice, tuple(itertools.islice(values, length)))
            for (coding, choice), length in zip(codings, lengths, strict=True)
        ]

    def plain(self, name: str, shape: tuple[int, ...], kind: int) -> StoredTensor:
        number = self.varint()
        if number > len(_RAW_TYPES):
            raise self.broken(f"tensor {name!r} has an unknown type")
        dtype = (*_RAW_TYPES, torch.float32)[number]
        elements = 1 if kind == _CONSTANT else math.prod(shape)
        data = self.take(elements * dtype.itemsize)
        value = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if kind == _CONSTANT:
            return StoredTensor(value[0].expand(shape), "constant")
        return StoredTensor(value.view(shape), "raw")

    def decode(
        self, state: CoderState, shape: tuple[int, ...], coding: Coding, choice: Choice, parameters: tuple[float, ...]
    ) -> StoredTensor:
        before = state.position
        codes = read_codes(state, shape, *coding.layout(choice), coding.repeats)
        if state.position > len(state.buffer) + 8:
            raise self.broken("its stream ends before its tensors")
        try:
            value = coding.decode(Coded(codes, parameters), choice)
        except (IndexError, ValueError, OverflowError) as error:
            raise self.broken("the parameters of a tensor do not fit its coding") from error
        return StoredTensor(value, choice, state.position - before, parameters)

    def recipe(self, names: list[str]) -> Recipe:
        choices: dict[str, Choice] = {}
        for _ in range(self.varint()):
            dimension, _, value = self.text().partition("\0")
            try:
                choice: Choice = {"s": str, "i": int, "f": float}[value[:1]](value[1:])
            except (KeyError, ValueError) as error:
                raise self.broken("its recipe cannot be read") from error
            for _ in range(self.varint()):
                place = self.varint()
                if place > len(names):
                    raise self.broken("its recipe names a tensor that is not there")
                site = self.text() if place == len(names) else names[place].removesuffix(".weight")
                choices[f"{site}:{dimension}"] = choice
        return Recipe.of(choices)
