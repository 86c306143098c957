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
from autocompress.artifact.basis import Basis
from autocompress.artifact.container import VERSION, Artifact, Plan, decode_artifact, encode_artifact
from autocompress.artifact.dictionary import DICTIONARY
from autocompress.recipe import Recipe
from autocompress.techniques.base import Coded, coding_of, transforms
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
    for name, choice, shape, codes, parameters, width in reference_reader.read(file.read_bytes(), DICTIONARY.tobytes()):
        tensor = ours[name]
        assert (choice, shape, tuple(parameters)) == (tensor.choice, list(tensor.value.shape), tensor.parameters)
        if codes is None:
            continue
        read = np.array(codes, np.int64).astype(np.int32).reshape(shape)
        value = coding_of(choice).decode(Coded(read, tuple(parameters)), choice)
        assert torch.equal(value, tensor.coded), name
        assert (width is None) == (tensor.basis is None)
        if width is not None:
            plain = torch.tensor(reference_reader.synthesised(value.flatten().tolist(), shape, width))
            assert torch.equal(plain.view(shape), tensor.value), name


def test_every_version_has_golden_files() -> None:
    assert {f"v{version}" for version in range(1, VERSION + 1)} <= {file.stem.split("-")[0] for file in FILES}


def make() -> None:
    """Transformed matrices and kernels. Version 1 has every coding and shape, and every way to walk a matrix; the
    history knows what wrote that."""
    torch.manual_seed(0)
    widths = {(5, 90): 9, (6, 70): 70, (4, 40): 10, (3, 2, 3, 3): 0, (4, 3, 9): 0, (2, 1, 2, 3, 8): 0}
    written: dict[str, Plan] = {}
    for shape, width in widths.items():
        for choice in ("int4", "e8m3"):
            value = torch.randn(shape) * (torch.rand(shape) < 0.5)
            fitted = coding_of(choice).initial(value, choice)
            written[f"{choice}{len(written)}.weight"] = Plan(value, choice, fitted, Basis(transforms()["dct"], width))
    written["zeros.weight"] = Plan(torch.zeros(4, 16), "int4", torch.zeros(1), Basis(transforms()["dct"], 4))
    written["plain.weight"] = Plan(torch.randn(6, 5), "float32")
    recipe = Recipe.of({"int40:activation_bits": 8})
    data = encode_artifact(written, recipe)
    (GOLDEN / f"v{VERSION}-transforms.acz").write_bytes(data)
    expected = json.dumps(content(decode_artifact(data)), indent=1)
    (GOLDEN / f"v{VERSION}-transforms.json").write_text(expected + "\n")


if __name__ == "__main__":
    make()
