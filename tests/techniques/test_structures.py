"""What structure, masks and training techniques do to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autocompress.errors import SpaceError
from autocompress.model.anatomy import read_anatomy
from autocompress.model.channel_graph import ChannelGraph
from autocompress.recipe import Choice
from autocompress.space import SearchSpace
from autocompress.task import Calibration, Task
from autocompress.techniques.base import Technique, maskings, structures, trainings
from autocompress.techniques.channels import kept_channels
from autocompress.techniques.importance import importance
from tests.conftest import ZOO, zoo_task

CHANNELS, ACTIVATION, ACTIVATION_BITS = (structures()[n] for n in ("channels", "activation", "activation_bits"))
SPARSITY = maskings()["sparsity"]


def run_of(task: Task) -> Calibration:
    batch = next(task.batches("train"))
    return Calibration(task, [batch])


def test_channels_are_removed_and_the_output_keeps_its_shape(any_task: Task) -> None:
    run, model = run_of(any_task), any_task.build()
    anatomy = read_anatomy(model, run)
    if not anatomy.groups:
        pytest.skip("nothing to prune in this model")
    expected = run(model).shape
    before = sum(p.numel() for p in model.parameters())
    CHANNELS.apply(model, {g.name: kept_channels(g.channels, 0.5) for g in anatomy.groups}, run)
    assert run(model).shape == expected
    assert sum(p.numel() for p in model.parameters()) < before
    again = copy.deepcopy(model)
    CHANNELS.apply(again, {g.name: kept_channels(g.channels, 0.5) for g in anatomy.groups}, run)
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_channels_are_the_same_behind_what_a_technique_put_on_the_values(name: str) -> None:
    """Also where that sorts and reshapes them, in a model that joins channels."""
    task = zoo_task(name)
    run, model = run_of(task), task.build()
    anatomy = read_anatomy(model, run)
    ACTIVATION.apply(model, dict.fromkeys(anatomy.activations, "topk-0.5"), run)
    ACTIVATION_BITS.apply(model, dict.fromkeys(anatomy.inputs, 8), run)
    graph = ChannelGraph(model, run)
    for group in anatomy.groups:
        assert graph.channels(group.name) == group.channels
        assert len(importance("l2", graph, group.name, run)) == group.channels


def test_the_weakest_channels_go_first() -> None:
    """A channel that was set to zero can be removed without a trace."""
    task = zoo_task("residual")
    run, model = run_of(task), task.build()
    with torch.no_grad():
        for channel in (2, 5):
            model.conv1.weight[channel] = 0
            model.conv1.bias[channel] = -1
            model.norm1.weight[channel] = 0
            model.norm1.bias[channel] = 0
            model.conv2.weight[:, channel] = 0
    expected = run(model)
    CHANNELS.apply(model, {"conv1": 6}, run)
    assert model.conv1.weight.shape[0] == 6
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


CRITERIA = ["l2", "l1", "geometric-median", "lamp", "activation", "kl", "random"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_removes_channels_of_every_model(criterion: str, any_task: Task) -> None:
    run, model = run_of(any_task), any_task.build()
    groups = read_anatomy(model, run).groups
    if not groups:
        pytest.skip("nothing to prune in this model")
    expected = run(model).shape
    CHANNELS.apply(model, {g.name: kept_channels(g.channels, 0.5) for g in groups}, run, {"importance": criterion})
    assert run(model).shape == expected
    assert read_anatomy(model, run).groups[0].channels == kept_channels(groups[0].channels, 0.5)


@pytest.mark.parametrize("criterion", ["l2", "l1", "lamp", "activation", "kl"])
def test_a_channel_that_does_nothing_goes_first(criterion: str) -> None:
    """The second one of the hidden layer is dead, whatever the criterion."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[2].weight[:, 1] = 0, -1, 0
    inputs = torch.randn(64, 6)
    expected = model(inputs)
    run = Calibration(Task(model, [], [], []), [(inputs, torch.zeros(64, dtype=torch.int64))])
    CHANNELS.apply(model, {"0": 7}, run, {"importance": criterion})
    assert model[0].weight.shape == (7, 6)
    torch.testing.assert_close(model(inputs), expected)


def test_the_geometric_median_drops_a_double() -> None:
    """Two filters of eight are the same: one of the crowd goes, not the outlier of least norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(8, 6) + 0.01 * torch.randn(8, 6))
        model[0].weight[5] = -0.1
    run = Calibration(Task(model, [], [], []), [(torch.randn(4, 6), None)])
    CHANNELS.apply(model, {"0": 4}, run, {"importance": "geometric-median"})
    assert bool((model[0].weight < 0).any())


def test_concatenated_channels_follow_their_source() -> None:
    """U-Net: what is removed from both ends of a skip connection leaves the right inputs behind."""
    task = zoo_task("unet")
    run, model = run_of(task), task.build()
    groups = [g.name for g in read_anatomy(model, run).groups]
    with torch.no_grad():
        model.down1[0].weight[[1, 3]] = 0
        model.down1[0].bias[[1, 3]] = 0
        model.down1[1].weight[[1, 3]] = 0
        model.down1[1].bias[[1, 3]] = 0
        model.up.weight[:, [0, 4]] = 0
        model.up.bias[[0, 4]] = 0
        model.down2[0].weight[:, [1, 3]] = 0
        model.join[0].weight[:, [1, 3, 8, 12]] = 0
    expected = run(model)
    assert {"down1.0", "up"} <= set(groups)
    CHANNELS.apply(model, {"down1.0": 6, "up": 6}, run)
    assert model.join[0].weight.shape[1] == 12
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_kept_channels_is_never_none() -> None:
    assert [kept_channels(10, share) for share in (0.01, 0.25, 1.0)] == [1, 2, 10]


@pytest.mark.parametrize(("choice", "kind"), [("relu", nn.ReLU), ("hardtanh", nn.Hardtanh)])
def test_activation_is_replaced(choice: str, kind: type[nn.Module]) -> None:
    model = ZOO["mlp"][0]()
    ACTIVATION.apply(model, {"2": choice}, lambda m: m)
    assert isinstance(model[2], kind)
    other = ZOO["mlp"][0]()
    ACTIVATION.restore(other, {"2": choice})
    inputs = torch.randn(4, 64)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(inputs), model(inputs))


def test_activations_take_two_to_the_bits_values_and_survive_the_file() -> None:
    task = zoo_task("mlp")
    model, run = task.build(), run_of(task)
    seen = []
    ACTIVATION_BITS.apply(model, {"3": 4}, run)
    model[3].register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    run(model)
    assert len(seen[0].unique()) <= 16
    fresh = task.build()
    ACTIVATION_BITS.restore(fresh, {"3": 4})
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(fresh), run(model))


def test_inputs_of_a_layer_that_runs_again_are_quantised_and_it_learns() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer)
    batch = torch.randn(32, 4)
    structures()["activation_bits"].apply(model, {"0": 4}, lambda m: m(batch))
    torch.autograd.backward(model.train()(batch).square().mean())
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.98])
def test_sparsity_zeroes_the_smallest_share(share: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30)
    mask = SPARSITY.mask(weight, share)
    assert int((~mask).sum()) == int(share * 600)
    if share:
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_equal_weights_are_cut_by_count_not_all() -> None:
    assert int(SPARSITY.mask(torch.ones(10), 0.5).sum()) == 5


@pytest.mark.parametrize(("stay", "of"), [(2, 4), (4, 8), (1, 3)])
def test_a_pattern_keeps_the_largest_of_each_group(stay: int, of: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    mask = SPARSITY.mask(weight, f"{stay}:{of}").view(6, 36)
    for row, kept in zip(weight.view(6, 36), mask, strict=True):
        for at in range(0, 36, of):
            group = row[at : at + of].abs()
            assert set(kept[at : at + of].nonzero().flatten().tolist()) == set(
                group.topk(min(stay, len(group))).indices.tolist()
            )


def test_a_threshold_cuts_below_its_deviations() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 60) * 0.3
    assert torch.equal(SPARSITY.mask(weight, "threshold-0.5"), weight.abs() >= 0.5 * weight.std(correction=0))
    assert int(SPARSITY.mask(torch.ones(4, 4), "threshold-5").sum()) == 16


def test_bad_choices_are_named() -> None:
    wrong: list[tuple[Technique, object]] = [(CHANNELS, 0), (CHANNELS, "half"), (ACTIVATION, "swish")]
    wrong += [(SPARSITY, raw) for raw in (1.0, True, "4:2", "2:", "threshold-x", "threshold-9")]
    for technique, raw in wrong:
        with pytest.raises(SpaceError, match=f"choice {raw!r} does not exist"):
            technique.parse(raw)


def test_neutral_choices_change_nothing() -> None:
    task = zoo_task("residual")
    run, model = run_of(task), task.build()
    expected = run(model)
    anatomy = read_anatomy(model, run)
    for technique in (ACTIVATION, ACTIVATION_BITS):
        technique.apply(model, dict.fromkeys(technique.sites(anatomy), technique.default), run)
    assert torch.equal(run(model), expected)
    assert bool(SPARSITY.mask(torch.randn(9), SPARSITY.default).all())


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_left_out_where_the_machine_has_no_arithmetic_for_it(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has}, raising=False)
    task = zoo_task("residual")
    anatomy = read_anatomy(task.build(), run_of(task))

    def offered(choices: str) -> list[tuple[Choice, ...]]:
        space = SearchSpace.parse(f"{{layers: {{'*': {{weights: [int4]}}}}, model: {{precision: {choices}}}}}")
        return [d.choices for d in space.bind(anatomy) if d.name == "precision"]

    assert offered("[float32, bfloat16]") == ([("float32", "bfloat16")] if has else [])
    assert offered("[bfloat16, float16]") == [("bfloat16",)], "it can be had"


def test_precision_modes() -> None:
    precision = trainings()["precision"]
    assert precision.available("bfloat16")
    assert precision.available("float16") == torch.cuda.is_available()
    with precision.autocast("bfloat16", torch.device("cpu")):
        assert (torch.randn(4, 4) @ torch.randn(4, 4)).dtype == torch.bfloat16
    with precision.autocast("float32", torch.device("cpu")):
        assert (torch.randn(4, 4) @ torch.randn(4, 4)).dtype == torch.float32
    if torch.cuda.is_available():
        with precision.autocast("float16", torch.device("cuda")):
            assert (torch.randn(4, 4, device="cuda") @ torch.randn(4, 4, device="cuda")).dtype == torch.float16
