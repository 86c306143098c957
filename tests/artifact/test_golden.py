"""Every released version of the format stays readable: files of the past decode to what they held.

    python tests/artifact/test_golden.py    writes the golden files of the present version

Files of a released version are never written again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autocompress  # noqa: F401  (registers the techniques)
from autocompress.artifact.container import VERSION, Artifact, Plan, decode_artifact, encode_artifact
from autocompress.artifact.dictionary import DICTIONARY
from autocompress.recipe import Recipe
from autocompress.techniques.base import Coded, coding_choices, coding_of
from tests.artifact import reference_reader

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*.acz"))


def content(artifact: Artifact) -> dict[str, Any]:
    tensors = {
        name: [
            str(t.choice),
            str(t.value.dtype),
            list(t.value.shape),
            hashlib.sha256(t.value.numpy().tobytes()).hexdigest(),
        ]
        for name, t in artifact.tensors.items()
    }
    return {"recipe": artifact.recipe.to_json(), "tensors": tensors}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_still_decodes_to_the_same(file: Path) -> None:
    assert content(decode_artifact(file.read_bytes())) == json.loads(file.with_suffix(".json").read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_reader_written_from_the_documentation_reads_it(file: Path) -> None:
    """docs/format.md is enough: the reader beside this test shares no code with ours."""
    ours = decode_artifact(file.read_bytes()).tensors
    for name, choice, shape, codes, parameters in reference_reader.read(file.read_bytes(), DICTIONARY.tobytes()):
        tensor = ours[name]
        assert (choice, shape, tuple(parameters)) == (tensor.choice, list(tensor.value.shape), tensor.parameters)
        if codes is not None:
            read = np.array(codes, np.int64).astype(np.int32).reshape(shape)
            assert torch.equal(coding_of(choice).decode(Coded(read, tuple(parameters)), choice), tensor.value), name


def test_every_version_has_golden_files() -> None:
    assert {f"v{version}" for version in range(1, VERSION + 1)} <= {file.stem.split("-")[0] for file in FILES}


def make() -> None:
    """One file with every coding and shape, one whose matrices choose every way to be walked."""
    torch.manual_seed(0)
    shapes = [(6, 4, 3, 3), (5, 3, 5), (12, 20), (33,), (4, 2, 2, 2, 2), (), (1, 9)]
    codings = {}
    for i, choice in enumerate(coding_choices()):
        value = torch.randn(shapes[i % len(shapes)]) * (torch.rand(shapes[i % len(shapes)]) < 0.6)
        codings[f"block{i}.conv.weight"] = Plan(value, choice, coding_of(choice).initial(value, choice))
    codings["constant"] = Plan(torch.full((2, 3), 0.5), "float32")
    for dtype in (torch.int64, torch.int8, torch.bool):
        codings[str(dtype)] = Plan(torch.tensor([3, 0, 1]).to(dtype), "float32")
    smooth = torch.nn.functional.avg_pool2d(torch.randn(8, 1, 16, 16), 3, 1, 1)
    dead = torch.randn(20, 6, 3, 3)
    walks = {
        "image": smooth.view(8, 256),
        "transposed": smooth.view(8, 256).T,
        "channels": torch.nn.functional.avg_pool2d(torch.randn(8, 12, 4, 4), 3, 1, 1).view(8, 192),
        "pruned": dead * (dead.abs() > 0.8),
        "factors": torch.randn(64, 2) @ torch.randn(2, 40) + 0.1 * torch.randn(64, 40),
    }
    plans = {f"{name}.weight": Plan(w, "int5", coding_of("int5").initial(w, "int5")) for name, w in walks.items()}
    recipe = Recipe.of({"block0.conv:activation_bits": 8, "relu:activation": "hardtanh", "model:price": 0.5})
    GOLDEN.mkdir(exist_ok=True)
    for name, written in (("codings", codings), ("walks", plans)):
        data = encode_artifact(written, recipe)
        (GOLDEN / f"v{VERSION}-{name}.acz").write_bytes(data)
        expected = json.dumps(content(decode_artifact(data)), indent=1)
        (GOLDEN / f"v{VERSION}-{name}.json").write_text(expected + "\n")


if __name__ == "__main__":
    make()
