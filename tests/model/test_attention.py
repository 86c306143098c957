"""Attention of torch's, made of linear layers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autocompress as ac
from autocompress.model.attention import Attention
from autocompress.model.reparametrization import copied, plain
from autocompress.task import measure
from tests.conftest import zoo_task


def torchs(**kwargs: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(12, 3, **kwargs).eval()
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_it_says_what_torchs_says(settings: dict[str, Any], single: bool) -> None:
    module = torchs(**settings)
    made, samples = Attention(module), 1 if single else 2
    inputs = [torch.randn(samples, places, width) for places, width in ((4, 12), (6, module.kdim), (6, module.vdim))]
    if single:
        inputs = [x[0] for x in inputs]
    elif not module.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    hidden = torch.rand(samples * 3, 4, 6) > 0.7
    hidden[..., 0] = False
    masks = [None, hidden[0], torch.randn(4, 6), hidden, torch.randn(samples * 3, 4, 6)]
    padded = (torch.arange(6) > 3).expand(samples, 6)
    paddings = [x if x is None or not single else x[0] for x in (None, padded, torch.randn(samples, 6))]
    for mask, padding, weights, mean in itertools.product(masks, paddings, (True, False), (True, False)):
        asked: dict[str, Any] = {"attn_mask": mask, "need_weights": weights, "average_attn_weights": mean}
        output, expected = (m(*inputs, key_padding_mask=padding, **asked) for m in (made, module))
        torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_it_drops_as_much_in_training() -> None:
    module = torchs(dropout=0.4, batch_first=True).train()
    made, x = Attention(module), torch.randn(512, 4, 12)
    for weights in (True, False):
        output, expected = (float(m(x, x, x, need_weights=weights)[0].var(0).mean()) for m in (made, module))
        assert output == pytest.approx(expected, rel=0.1)
        assert not torch.equal(made(x, x, x)[0], made(x, x, x)[0])


def test_frozen_ones_stay_frozen_and_shared_or_unusual_ones_what_they_are() -> None:
    frozen, shared = torchs().requires_grad_(False), [torchs(), torchs()]
    shared[0].in_proj_weight = shared[1].in_proj_weight
    unusual = [torchs(add_bias_kv=True), torchs(add_zero_attn=True)]
    made = plain(nn.ModuleList([torchs(), frozen, *shared, *unusual]))
    assert isinstance(made, nn.ModuleList)
    assert [type(module) for module in made] == [Attention] * 2 + [nn.MultiheadAttention] * 4
    assert [all(p.requires_grad for p in module.parameters()) for module in made] == [True, False] + [True] * 4
    assert isinstance(plain(torchs()), Attention)


def test_code_that_asks_for_torchs_finds_it() -> None:
    """As PyTorch Geometric asks for the class and WavLM of torchaudio for the tensors."""
    for settings in ({}, {"bias": False}):
        module = torchs(**settings)
        made = Attention(module)
        assert isinstance(made, nn.MultiheadAttention)
        assert torch.equal(made.in_proj_weight, module.in_proj_weight)
        if settings:
            assert made.in_proj_bias is None
        else:
            assert torch.equal(made.in_proj_bias, module.in_proj_bias)


class Translator(nn.Module):
    """An encoder and a decoder, torch's own: one asks itself, the other both itself and the first."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        output: Tensor = self.head(self.decoder(x, self.encoder(x), mask, tgt_is_causal=True).mean(1))
        return output


def test_width_and_heads_of_torchs_transformer_are_pruned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Translator().eval(), []
    for _ in range(3):
        x = torch.randn(16, 6, 5)
        batches.append((x, model(x).argmax(1)))
    task = ac.Task(model, train=batches, val=batches, test=batches, epochs=1)
    workshop = ac.Workshop.on(task, ac.SearchSpace.named("default"), tmp_path)
    assert measure(task, workshop.original, "val") == 1
    groups = {group.name: group.channels for group in workshop.anatomy.groups}
    attentions = ["encoder.self_attn", "decoder.self_attn", "decoder.multihead_attn"]
    assert groups["into"] == 16
    assert all(groups[f"{name}.q_proj"] == 16 for name in attentions)
    chosen = workshop.space.recipe({d.key: 0.55 for d in workshop.space if d.name == "channels"})
    result = workshop.finish(0, chosen)
    decoded = ac.load(tmp_path / "trials" / "0" / "model.acz", Translator)
    assert measure(task, decoded, "val") == result.val_accuracy
    assert decoded.get_parameter("decoder.multihead_attn.q_proj.weight").shape == (8, 9), "heads lose as much each"


def test_a_silent_channel_of_every_head_changes_nothing() -> None:
    """Scores keep their scale, whatever is left of a head."""
    torch.manual_seed(0)
    made, x = Attention(torchs()), torch.randn(5, 2, 12)
    silent = [3, 7, 11]  # of 3 heads of 4 channels
    with torch.no_grad():
        for layer in (made.q_proj, made.k_proj, made.v_proj):
            layer.weight[silent], layer.bias[silent] = 0, 0
        before = made(x, x, x)[0]
        for layer in (made.q_proj, made.k_proj, made.v_proj):
            rest = [row for row in range(12) if row not in silent]
            layer.weight, layer.bias = nn.Parameter(layer.weight[rest]), nn.Parameter(layer.bias[rest])
        made.out_proj.weight = nn.Parameter(made.out_proj.weight[:, rest])
        torch.testing.assert_close(made(x, x, x)[0], before)


def test_a_copy_can_be_made_plain_once_more() -> None:
    made = plain(copied(zoo_task("transformer").build()))
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(plain(copied(made))(x), made(x))
