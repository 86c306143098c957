"""What is read off models of every kind."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.model.anatomy import read_anatomy
from autocompress.task import Task
from tests.conftest import Recurrent, anatomy_of, zoo_task


def test_reading_leaves_the_model_as_it_was(any_task: Task) -> None:
    model = any_task.build()
    before = copy.deepcopy(model.state_dict())
    batch = next(any_task.batches("train"))
    read_anatomy(model, lambda m: any_task.run(m, batch)[0])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_groups_of_a_residual_net_share_the_trunk() -> None:
    anatomy = anatomy_of(zoo_task("residual"))
    assert [(g.name, g.channels) for g in anatomy.groups] == [("stem.0", 8), ("conv1", 8)]
    assert dict(anatomy.layer("conv2").groups) == {"stem.0": 1, "conv1": 1}
    assert anatomy.left_alone == {"head": "its channels are outputs of the model"}


def test_concatenated_channels_of_a_unet_are_separate_groups() -> None:
    anatomy = anatomy_of(zoo_task("unet"))
    names = {g.name for g in anatomy.groups}
    assert dict(anatomy.layer("join.0").groups) == {"down1.0": 0.5, "up": 0.5, "join.0": 1}
    assert {"down1.0", "up"} <= names


def test_tied_weights_are_one_layer() -> None:
    anatomy = anatomy_of(zoo_task("tied"))
    assert [layer.name for layer in anatomy.layers] == ["embed", "up", "down"]
    assert "shares a weight" in anatomy.left_alone["out"]


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.core = nn.Linear(8, 8), Recurrent(nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.core(self.into(x))
        return out


def test_what_cannot_be_pruned_is_reported() -> None:
    batches = [(torch.randn(4, 6, 8), torch.zeros(4))]
    anatomy = anatomy_of(Task(Remembering(), batches, batches, batches))
    assert anatomy.left_alone["into"] == "its channels pass through core.core (LSTM)"
    assert not anatomy.groups


def test_every_layer_of_an_encoder_can_be_reached() -> None:
    anatomy = anatomy_of(zoo_task("transformer"))
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear1", "linear2"]
    layers = [f"encoder.layers.{at}.{part}" for at in range(2) for part in parts]
    assert [layer.name for layer in anatomy.layers if layer.name.startswith("encoder")] == layers
    assert {*anatomy.inputs} == {"into", *layers, "head"}
    assert anatomy.left_alone == {"head": "its channels are outputs of the model"}


@dataclass
class Said:
    logits: Tensor
    hidden: Tensor


class Sayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Said:
        hidden = self.first(x).relu()
        return Said(self.head(self.inner(hidden).relu()), hidden)


def test_channels_that_are_outputs_in_a_data_class_are_left_alone() -> None:
    batches = [(torch.randn(4, 8), torch.zeros(4))]
    anatomy = anatomy_of(Task(Sayer(), batches, batches, batches))
    assert [group.name for group in anatomy.groups] == ["inner"]
    assert anatomy.left_alone["first"] == anatomy.left_alone["head"] == "its channels are outputs of the model"


class Tokens(nn.Module):
    """Parameters of several dimensions, some of which are vectors all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.ones(16, 1))
        self.place, self.core = nn.Parameter(torch.randn(1, 6, 16)), nn.LSTM(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x)[0] + self.token + self.place
        out: Tensor = self.head((y.mT * self.scale).mT.mean(1))
        return out


def test_vectors_of_several_dimensions_are_no_layers() -> None:
    batches = [(torch.randn(4, 6, 1), torch.zeros(4, 1))]
    anatomy = anatomy_of(Task(Tokens(), batches, batches, batches))
    assert {layer.name for layer in anatomy.layers} == {"place", "core.weight_ih_l0", "core.weight_hh_l0", "head"}


def test_recurrent_weights_are_layers() -> None:
    names = {layer.name for layer in anatomy_of(zoo_task("lstm")).layers}
    assert {"core.weight_ih_l0", "core.weight_hh_l0", "head"} <= names
