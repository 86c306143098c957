"""The file: what goes in comes out, and nothing that is damaged comes in."""

from __future__ import annotations

import os
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.artifact.basis import Basis
from autocompress.artifact.coder import CoderState
from autocompress.artifact.container import (
    MAGIC,
    VERSION,
    Plan,
    decode_artifact,
    decoded,
    encode_artifact,
    read_artifact,
)
from autocompress.artifact.pack import unpack
from autocompress.errors import ArtifactError
from autocompress.files import write_file
from autocompress.recipe import Recipe
from autocompress.report.inside import parts
from autocompress.tasks.digits import residual_net
from autocompress.techniques.base import coding_choices, coding_of, transforms

names = st.text(st.characters(exclude_characters="\n:", exclude_categories=["C"]), min_size=1, max_size=12)


def plan(value: torch.Tensor, choice: str) -> Plan:
    return Plan(value, choice, coding_of(choice).initial(value, choice))


def basis_for(value: torch.Tensor) -> Basis | None:
    """Each row of a matrix is one image of one row."""
    if value.ndim < 2 or not value.numel():
        return None
    return Basis(transforms()["dct"], value.shape[1] if value.ndim == 2 else 0)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Plan]:
    out = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        shape = draw(st.lists(st.integers(0, 6), max_size=4))
        torch.manual_seed(draw(st.integers(0, 99)))
        if draw(st.booleans()):
            value = torch.randn(shape) * (torch.rand(shape) < 0.5)
            coded = plan(value, draw(st.sampled_from(sorted(map(str, coding_choices())))))
            out[name] = replace(coded, basis=draw(st.sampled_from([None, basis_for(value)])))
        else:
            out[name] = Plan(torch.randint(-5, 5, shape), "float32")
    return out


recipes = st.dictionaries(
    st.tuples(names, st.sampled_from(["weights", "sparsity", "channels"])).map(lambda k: f"{k[0]}:{k[1]}"),
    st.one_of(st.sampled_from(["int4", "float32"]), st.floats(0, 1), st.integers(0, 32)),
    max_size=6,
).map(Recipe.of)


@settings(max_examples=100, deadline=None)
@given(plans(), recipes)
def test_round_trip(written: dict[str, Plan], recipe: Recipe) -> None:
    data = encode_artifact(written, recipe)
    artifact = decode_artifact(data)
    assert artifact.recipe == recipe
    assert list(artifact.tensors) == list(written)
    for name, given_plan in written.items():
        expected, stored = decoded(given_plan), artifact.tensors[name]
        got = stored.coded
        if stored.basis:
            assert torch.equal(stored.value, stored.basis.read(got))
        assert stored.basis == (given_plan.basis if stored.choice not in ("constant", "raw") else None)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(got, expected)
    assert artifact.size_bytes == len(data)
    assert artifact.header_bytes + sum(t.size_bytes for t in artifact.tensors.values()) == len(data)


@pytest.mark.parametrize("shape", [(1, 1, 300, 300), (2, 3, 70_000), (1, 100_000), (100_000, 1)])
def test_long_kernels_and_rows_come_back(shape: tuple[int, ...]) -> None:
    """Positions of a transformer, filters in the Fourier domain: no shape that is written is refused."""
    torch.manual_seed(0)
    written = plan(torch.randn(shape) * (torch.rand(shape) < 0.02), "int4")
    assert torch.equal(decode_artifact(encode_artifact({"w": written}, Recipe())).tensors["w"].value, decoded(written))


def sample() -> bytes:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    layers = {f"layer{i}.weight": plan(weight * i, choice) for i, choice in enumerate(["int4", "float16", "int2"], 1)}
    layers["layer1.weight"] = replace(layers["layer1.weight"], basis=basis_for(weight))
    layers["steps"] = Plan(torch.tensor(7), "float32")
    return encode_artifact(layers, Recipe.of({"layer1:weights": "int4", "model:vectors": "e8m3"}))


def sealed(data: bytes) -> bytes:
    """`data` with a checksum that fits: what a malicious writer would make."""
    return data[:5] + zlib.crc32(data[9:]).to_bytes(4, "little") + data[9:]


def test_every_truncation_and_trailing_data_is_refused() -> None:
    data = sample()
    for length in range(len(data)):
        with pytest.raises(ArtifactError):
            decode_artifact(data[:length])
    for extra in (b"\0", b"more"):
        with pytest.raises(ArtifactError):
            decode_artifact(data + extra)


def test_every_flipped_bit_is_refused() -> None:
    data = sample()
    for bit in range(0, 8 * len(data), 7):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            decode_artifact(bytes(broken))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_file_with_a_right_checksum_is_read_or_refused(data: st.DataObject) -> None:
    broken = bytearray(sample())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(9, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(17, len(broken)))
    with suppress(ArtifactError):
        decode_artifact(sealed(bytes(broken[:cut])))


def forged(header: bytes, version: int = 1) -> bytes:
    """A file with this header, well coded and sealed."""
    state = CoderState()
    state.code_text(np.frombuffer(header, np.uint8).copy())
    body = bytes([len(header)]) + state.finish()
    return sealed(MAGIC + bytes([version]) + bytes(4) + body)


BILLION = b"\x80\x94\xeb\xdc\x03"
INT8, CONSTANT, RAW = b"\x22", b"\x00", b"\x01"
LIES = {
    "it declares more weights": b"\x01\x01w\x02" + BILLION + b"\x40" + INT8 + bytes(4) + b"\0",
    "it declares more": b"\x01\x01w\x01" + BILLION + RAW + b"\x08" + bytes(9) + b"\0",
    "an impossible shape": b"\x01\x01w\x04\x02\x02" + BILLION + BILLION + INT8 + bytes(4) + b"\0",
    "has 99 dimensions": b"\x01\x01w\x63" + b"\x02" * 99 + INT8 + bytes(4) + b"\0",
    "missing or double": b"\x02\x03w\nw\x01\x01\x02\x02" + INT8 * 2 + bytes(8) + b"\0",
    "unknown coding": b"\x01\x01w\x01\x05\x7f" + bytes(4) + b"\0",
    "a coded tensor is empty": b"\x01\x01w\x01\x01" + INT8 + bytes(4) + b"\0",
    "longer than its content": b"\x01\x01w\x01\x05" + INT8 + bytes(4) + b"\0more",
    "ends too early": b"\x01\x01w\x01\x05" + INT8 + bytes(2),
}


@pytest.mark.parametrize("message", LIES)
def test_a_header_that_lies_is_refused_before_it_costs_anything(message: str) -> None:
    data = forged(LIES[message])
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=message):
            decode_artifact(data)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("transform", [b"\x7f\x08", b"\x01\x03", b"\x01\x00"], ids=["unknown", "width", "no width"])
def test_a_transform_that_does_not_fit_is_refused(transform: bytes) -> None:
    """Of a matrix of 4 x 8."""
    with pytest.raises(ArtifactError, match="unknown or does not fit"):
        decode_artifact(forged(b"\x01\x01w\x02\x05\x09" + INT8 + transform + bytes(5), 2))


def test_only_files_with_transforms_need_a_new_reader() -> None:
    torch.manual_seed(0)
    value = torch.randn(4, 16)
    plain, basis = plan(value, "int4"), Basis(transforms()["dct"], 4)
    versions = {}
    for name, one in {"plain": plain, "dct": replace(plain, basis=basis), "zeros": Plan(value * 0, "float32")}.items():
        versions[name] = encode_artifact({"w": one}, Recipe())[len(MAGIC)]
    assert versions == {"plain": 1, "dct": 2, "zeros": 1}


def test_a_constant_costs_nothing_however_large_it_is() -> None:
    tracemalloc.start()
    try:
        dimensions = BILLION + b"\xe9\x07"  # a thousand
        artifact = decode_artifact(forged(b"\x01\x06weight\x02" + dimensions + CONSTANT + b"\x08" + bytes(4) + b"\0"))
        assert artifact.tensors["weight"].value.numel() > 1e11
        assert parts(artifact)[0].zeros == 1
        with pytest.raises(ArtifactError, match="expected shape"):
            unpack(artifact, nn.Linear(5, 5, bias=False))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_the_header_is_small() -> None:
    """At most 64 bytes and 12 for each layer beyond the coded data, for the names and choices of a real net."""
    model = residual_net()
    layers = [name for name, value in model.state_dict().items() if value.ndim > 1]
    plans = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            plans[name] = plan(value + 1e-3 * torch.randn_like(value), "int4" if value.ndim > 1 else "e8m3")
    recipe = Recipe.of({f"{name.removesuffix('.weight')}:activation_bits": 8 for name in layers})
    assert decode_artifact(encode_artifact(plans, recipe)).header_bytes <= 64 + 12 * len(layers)


def test_foreign_and_newer_files_are_told_apart() -> None:
    with pytest.raises(ArtifactError, match="not an autocompress artifact"):
        decode_artifact(b"PK\x03\x04 something else entirely")
    newer = bytearray(sample())
    newer[len(MAGIC)] = VERSION + 1
    with pytest.raises(ArtifactError, match="upgrade autocompress"):
        decode_artifact(bytes(newer))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_artifact(tmp_path / "none.acz")
    with pytest.raises(ArtifactError, match="Is a directory"):
        read_artifact(tmp_path)


def test_not_finite_weights_cannot_be_stored() -> None:
    with pytest.raises(ArtifactError, match="'w' holds values that are not finite"):
        encode_artifact({"w": Plan(torch.tensor([1.0, float("nan")]), "float32")}, Recipe())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.acz"
    write_file(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.acz"]
