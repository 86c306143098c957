"""The `.acz` file: parse and write, without a model. The format is told in docs/format.md.

    magic "\\x89ACZ" | version u8 | CRC-32 of the rest u32 | header length u32 (raw) | header length
    u32 (deflated) | header, deflated | entropy-coded stream to the end

The header is packed binary: names, shapes, codings, steps and the recipe. Nothing in a file is
executed, and no allocation is larger than the sizes that the file declares and the reader has checked.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.artifact.coder import MAX_WEIGHTS_PER_BYTE, CoderState
from autocompress.errors import ArtifactError
from autocompress.recipe import Choice, Recipe
from autocompress.techniques.base import Coded, Coding, coding_of, coding_tagged

MAGIC = b"\x89ACZ"
VERSION = 1
_PREFIX = struct.Struct("<4sBIII")
_MAX_HEADER = 1 << 26
_MAX_ROW_KERNEL = 1 << 16
_EMPTY = torch.empty(0)
_DICTIONARY = (
    b"channels\0activation\0relu\0hardtanh\0activation_bits\0precision\0bfloat16\0rate_penalty\0"
    b"vectors\0float16\0e8m5\0e8m3\0int8\0int6\0weights\0int5\0int4\0int3\0int2\0sparsity\0"
    b"encoder.layers.0.self_attn.in_proj_weight\nout_proj.weight\nlinear1.weight\nlinear2.bias\n"
    b"features.0.conv.weight\nlayer1.0.conv1.weight\nlayer1.0.bn1.weight\nrunning_mean\nrunning_var\n"
    b"num_batches_tracked\nshortcut.norm2.bias\nconv2.weight\nhead.weight\nhead.bias\n"
)
CODED, CONSTANT, RAW = range(3)
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
    coded in ("constant" and "raw" for tensors that need none). size_bytes: bytes of the
    entropy-coded stream that it takes (headers are counted apart).
    """

    value: Tensor
    choice: Choice
    size_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A tensor to be written: `value` coded by `choice` with the learned `parameters`."""

    value: Tensor
    choice: Choice
    parameters: Tensor = _EMPTY


@dataclass(frozen=True)
class Artifact:
    """A parsed file: what it holds, without a model.

    tensors: name -> tensor. recipe: what was asked for. header_bytes: everything but the streams.
    """

    recipe: Recipe
    tensors: dict[str, StoredTensor]
    header_bytes: int
    size_bytes: int


def decoded(plan: Plan) -> Tensor:
    """The tensor that a reader will get, without writing it."""
    if not plan.value.is_floating_point():
        return plan.value
    coding = coding_of(plan.choice)
    return coding.decode(coding.encode(plan.value.float(), plan.choice, plan.parameters), plan.choice)


# ------------------------------------------------------------------------------------- write


def encode_artifact(plans: dict[str, Plan], recipe: Recipe) -> bytes:
    """The bytes of a file that decodes to `plans`; bit-exact (see `Coding`)."""
    writer = _Writer()
    names = "\n".join(plans).encode()
    writer.varint(len(plans))
    writer.blob(names)
    state = CoderState()
    kinds, rest = _Writer(), _Writer()
    for name, plan in plans.items():
        value = plan.value.detach().cpu()
        kinds.varint(value.ndim)
        for length in value.shape:
            kinds.varint(length)
        if value.numel() and bool((value == value.flatten()[0]).all()):
            kinds.varint(CONSTANT)
            _write_raw(rest, value.flatten()[:1])
        elif not value.is_floating_point() or value.dtype == torch.float64:
            kinds.varint(RAW)
            _write_raw(rest, value)
        else:
            kinds.varint(CODED)
            _write_coded(rest, state, value.float(), plan, name)
    writer.data += kinds.data + rest.data
    _write_recipe(writer, recipe, list(plans))
    header = bytes(writer.data)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY)
    deflated = packer.compress(header) + packer.flush()
    body = struct.pack("<II", len(header), len(deflated)) + deflated + state.finish()
    return MAGIC + struct.pack("<BI", VERSION, zlib.crc32(body)) + body


def _write_coded(rest: _Writer, state: CoderState, value: Tensor, plan: Plan, name: str) -> None:
    coding = coding_of(plan.choice)
    if not bool(torch.isfinite(value).all()):
        raise ArtifactError(f"tensor {name!r} holds values that are not finite: it cannot be stored")
    coded = coding.encode(value, plan.choice, plan.parameters)
    matrix, kernel = matrix_of(coded.codes)
    exponent, mantissa = coding.layout(plan.choice)
    transposed = False
    if matrix.shape[0] > 1 and kernel == 1 and matrix.size <= 1 << 20:
        ahead, across = state.copy(), state.copy()
        ahead.code(matrix.copy(), kernel, exponent, mantissa, True)
        across.code(np.ascontiguousarray(matrix.T), 1, exponent, mantissa, True)
        transposed = across.position < ahead.position
    rest.varint(coding.tag * 2 + transposed)
    rest.varint(list(coding.choices()).index(plan.choice))
    rest.varint(len(coded.parameters))
    rest.data += struct.pack(f"<{len(coded.parameters)}f", *coded.parameters)
    state.code(
        np.ascontiguousarray(matrix.T) if transposed else matrix.copy(),
        kernel,
        exponent,
        mantissa,
        True,
    )


def matrix_of(codes: Codes) -> tuple[Codes, int]:
    """Codes as [rows, columns] and the columns of one input channel."""
    if codes.ndim < 2:
        return codes.reshape(1, -1), 1
    return codes.reshape(codes.shape[0], -1), max(1, math.prod(codes.shape[2:]))


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


def write_file(path: Path, data: bytes) -> None:
    """Write atomically: a killed writer leaves the old file or none. Raises ArtifactError on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


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
    _, version, checksum, raw_length, deflated_length = _PREFIX.unpack_from(data)
    if version > VERSION:
        raise ArtifactError(
            f"{where} has format version {version}, this release reads up to {VERSION}: upgrade autocompress"
        )
    if zlib.crc32(data[9:]) != checksum:
        raise ArtifactError(f"{where} is damaged: its checksum does not match")
    if raw_length > _MAX_HEADER or _PREFIX.size + deflated_length > len(data):
        raise ArtifactError(f"{where} is damaged: its header has an impossible length")
    unpacker = zlib.decompressobj(-15, _DICTIONARY)
    try:
        header = unpacker.decompress(data[_PREFIX.size : _PREFIX.size + deflated_length], raw_length + 1)
    except zlib.error as error:
        raise ArtifactError(f"{where} is damaged: its header cannot be inflated") from error
    if len(header) != raw_length or not unpacker.eof:
        raise ArtifactError(f"{where} is damaged: its header has another length than it declares")
    stream = data[_PREFIX.size + deflated_length :]
    tensors, recipe = _Reader(header, where).artifact(stream)
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

    def artifact(self, stream: bytes) -> tuple[dict[str, StoredTensor], Recipe]:
        count = self.varint()
        text = self.text()
        names = text.split("\n") if count else []
        if len(names) != count or len(set(names)) != count:
            raise self.broken("names of tensors are missing or double")
        kinds = [self.shape_and_kind(name) for name in names]
        weights = sum(math.prod(shape) for shape, _ in kinds)
        if weights > MAX_WEIGHTS_PER_BYTE * (len(stream) + 64) + 64 * len(self.data):
            constant = sum(math.prod(shape) for shape, kind in kinds if kind != CODED)
            if weights - constant > MAX_WEIGHTS_PER_BYTE * (len(stream) + 64) or constant > 1 << 24:
                raise self.broken("it declares more weights than its length can hold")
        descriptions = [self.describe(name, shape, kind) for name, (shape, kind) in zip(names, kinds, strict=True)]
        recipe = self.recipe(names)
        if self.at != len(self.data):
            raise self.broken("its header is longer than its content")
        state = CoderState(stream)
        tensors = {}
        for name, (shape, _), description in zip(names, kinds, descriptions, strict=True):
            if isinstance(description, StoredTensor):
                tensors[name] = description
            else:
                tensors[name] = self.decode(state, shape, *description)
        if state.position > len(stream) + 8 or state.position < len(stream):
            raise self.broken("its stream has another length than its tensors")
        return tensors, recipe

    def shape_and_kind(self, name: str) -> tuple[tuple[int, ...], int]:
        dimensions = self.varint()
        if dimensions > 8:
            raise self.broken(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.varint() for _ in range(dimensions))
        kind = self.varint()
        if math.prod(shape) >= 1 << 40 or kind > RAW or max(shape[2:], default=0) > _MAX_ROW_KERNEL:
            raise self.broken(f"tensor {name!r} has an impossible shape or kind")
        return shape, kind

    def describe(
        self, name: str, shape: tuple[int, ...], kind: int
    ) -> StoredTensor | tuple[Coding, Choice, tuple[float, ...], bool]:
        if kind != CODED:
            number = self.varint()
            if number > len(_RAW_TYPES):
                raise self.broken(f"tensor {name!r} has an unknown type")
            dtype = (*_RAW_TYPES, torch.float32)[number]
            elements = 1 if kind == CONSTANT else math.prod(shape)
            data = self.take(elements * dtype.itemsize)
            value = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            full = value.expand(math.prod(shape)).clone() if kind == CONSTANT else value
            return StoredTensor(full.view(shape), "constant" if kind == CONSTANT else "raw")
        tag = self.varint()
        coding = coding_tagged(tag >> 1)
        index = self.varint()
        if coding is None or index >= len(coding.choices()):
            raise self.broken(f"tensor {name!r} has an unknown coding")
        count = self.varint()
        parameters = struct.unpack(f"<{count}f", self.take(4 * count))
        return coding, coding.choices()[index], parameters, bool(tag & 1)

    def decode(
        self,
        state: CoderState,
        shape: tuple[int, ...],
        coding: Coding,
        choice: Choice,
        parameters: tuple[float, ...],
        transposed: bool,
    ) -> StoredTensor:
        before = state.position
        codes = np.zeros(shape, np.int32)
        matrix, kernel = matrix_of(codes)
        turned = np.ascontiguousarray(matrix.T) if transposed else matrix
        state.code(turned, kernel, *coding.layout(choice), False)
        if transposed:
            codes = np.ascontiguousarray(turned.T).reshape(shape)
        try:
            value = coding.decode(Coded(codes, parameters), choice)
        except (IndexError, ValueError) as error:
            raise self.broken("the parameters of a tensor do not fit its coding") from error
        return StoredTensor(value, choice, state.position - before)

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
