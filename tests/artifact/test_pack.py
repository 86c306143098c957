"""Models to files and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.artifact import load, pack, unpack
from autocompress.artifact.container import decode_artifact
from autocompress.artifact.pack import Weights, fold_norms, with_statistics
from autocompress.errors import ArtifactError
from autocompress.model.surgery import assign, tensors
from autocompress.recipe import Recipe
from tests.conftest import ZOO


def trained(seed: int = 0) -> nn.Module:
    """A residual net whose batch norms have seen data."""
    torch.manual_seed(seed)
    model = ZOO["residual"][0]()
    for _ in range(3):
        model(torch.randn(32, 1, 8, 8) * 2 + 1)
    return model.eval()


def test_folded_norms_compute_the_same() -> None:
    model = trained()
    folded = copy.deepcopy(model)
    assign(folded, with_statistics(folded, fold_norms(model)))
    inputs = torch.randn(16, 1, 8, 8)
    torch.testing.assert_close(folded(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_a_dead_channel_folds_to_its_shift() -> None:
    model = trained()
    with torch.no_grad():
        model.conv1.weight[3] = 0
        model.norm1.running_var[3] = 0
        model.norm1.running_mean[3] = 0
    folded = fold_norms(model)
    assert folded["norm1.weight"].abs().max() < 100
    assert folded["norm1.bias"][3] == model.norm1.bias[3]


def test_the_weights_of_the_target_model_do_not_matter() -> None:
    model, other = trained(0), trained(1)
    data = pack(Weights(model), Recipe())
    inputs = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(unpack(data, other)(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    assert not torch.equal(tensors(other)["conv1.weight"], tensors(model)["conv1.weight"])


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    model = ZOO["tied"][0]()
    back = unpack(pack(Weights(model), Recipe()), ZOO["tied"][0])
    assert back.out.weight is back.embed.weight
    assert torch.equal(back.out.weight, model.out.weight)


@pytest.mark.parametrize(("vectors", "bias"), [("e8m2", "e8m2"), ("int4", "float32")])
def test_short_vectors_stay_exact_only_where_a_step_of_their_own_would_cost_as_much(vectors: str, bias: str) -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.PReLU(init=0.3), nn.Linear(9, 3))
    stored = decode_artifact(pack(Weights(model), Recipe.of({"model:vectors": vectors}))).tensors
    assert (stored["0.bias"].choice, stored["2.bias"].choice) == (vectors, bias)
    assert torch.equal(stored["1.weight"].value, model[1].weight)


@pytest.mark.parametrize("other", ["mlp", "unet", "lstm"])
def test_another_architecture_is_refused(other: str) -> None:
    data = pack(Weights(trained()), Recipe())
    with pytest.raises(ArtifactError, match="another architecture"):
        unpack(data, ZOO[other][0])


def test_a_wrong_shape_is_refused() -> None:
    data = pack(Weights(nn.LSTM(4, 8)), Recipe())
    with pytest.raises(ArtifactError, match="expected shape"):
        unpack(data, nn.LSTM(4, 6))


def test_load_takes_paths(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        load(f"{tmp_path}/no.acz", trained)


def test_biases_as_integers_take_few_values_and_few_bytes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 4))
    recipes = {choice: Recipe.of({"model:vectors": choice}) for choice in ("e8m2", "int3")}
    files = {choice: pack(Weights(model), recipe) for choice, recipe in recipes.items()}
    bias = tensors(unpack(files["int3"], model))["0.bias"]
    assert len(bias.unique()) <= 8
    assert (bias - model[0].bias).abs().mean() < 0.2 * model[0].bias.abs().mean()
    assert len(files["int3"]) < len(files["e8m2"]) - 40
