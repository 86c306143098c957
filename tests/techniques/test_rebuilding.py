"""Dropped, factorised and stacked modules: inside every architecture, through the file, down the lineage."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import pack, unpack
from autocompress.errors import RecipeError, SpaceError
from autocompress.model.surgery import as_real
from autocompress.recipe import Choice, Recipe
from autocompress.space import SearchSpace
from autocompress.task import Calibration, Task, load_task, measure
from autocompress.techniques.base import structures
from autocompress.techniques.stack import Stack
from autocompress.trial.compression import Candidate
from autocompress.trial.probing import rebuilt
from autocompress.trial.training import fine_tune
from autocompress.trial.workshop import Workshop
from tests.conftest import ZOO, small_digits, workshop_of, zoo_task

STRUCTURE = structures()["structure"]
CHOICES = ["drop", "lowrank-0.25", "stack-2x0.25"]


def candidate_of(workshop: Workshop, choices: dict[str, Choice], parent: Candidate | None = None) -> Candidate:
    state, recipe = (parent.state(), parent.recipe) if parent else (None, None)
    return Candidate(
        workshop.original, workshop.anatomy, Recipe.of(choices), workshop.calibration, state, parent_recipe=recipe
    )


def sites(workshop: Workshop, choice: str) -> list[str]:
    return [site for site in STRUCTURE.sites(workshop.anatomy) if STRUCTURE.fits(choice, site, workshop.anatomy)]


def outputs(task: Task, model: nn.Module) -> Tensor:
    with torch.no_grad():
        output, _ = task.run(model, next(task.batches("val")))
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("choice", CHOICES)
def test_one_site_at_a_time_in_every_model(choice: str, any_task: Task) -> None:
    """Fine-tuned together with pruning and quantisation, written, read back to the bit; fewer weights."""
    workshop = workshop_of(any_task)
    found = sites(workshop, choice)
    if not found:
        pytest.skip("this model has no part for it")
    whole = sum(p.numel() for p in workshop.original.parameters())
    for site in found:
        named: dict[str, Choice] = {f"{site}:structure": choice}
        for layer in workshop.anatomy.layers:
            named |= {f"{layer.name}:weights": "int6", f"{layer.name}:sparsity": 0.3}
        named |= {f"{group.name}:channels": 0.75 for group in workshop.anatomy.groups}
        named |= {f"{name}:activation_bits": 8 for name in workshop.anatomy.inputs}
        candidate = candidate_of(workshop, named)
        for _ in fine_tune(any_task, candidate, workshop.original, 1):
            pass
        assert sum(p.numel() for p in candidate.model.parameters()) < whole
        decoded = unpack(pack(candidate.weights(), candidate.recipe), any_task.build())
        got, expected = outputs(any_task, decoded), outputs(any_task, candidate.model)
        assert got.shape == outputs(any_task, workshop.original).shape
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        for shadow in candidate.layers.values():
            assert torch.equal(decoded.get_parameter(shadow.key), shadow.parameter)
            assert len(as_real(shadow.parameter).unique()) <= 64


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_reach_every_part(choice: str) -> None:
    task = zoo_task("residual" if "stack" in choice else "transformer")
    workshop = workshop_of(task)
    candidate = candidate_of(workshop, {f"{sites(workshop, choice)[-1]}:structure": choice})
    weights, _ = candidate.trainable()
    candidate.materialise(keep_graph=True)
    output, target = task.run(candidate.model, next(task.batches("train")))
    torch.autograd.backward(task.loss(output, target))
    candidate.backpropagate()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in weights)


def test_low_rank_is_the_best_of_its_rank() -> None:
    """Independent reference: numpy's truncated singular value decomposition."""
    import numpy as np

    torch.manual_seed(0)
    for model, inputs in (
        (nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)),
        (nn.Sequential(nn.Conv2d(4, 12, 3, 2, 1, padding_mode="reflect")), torch.randn(2, 4, 9, 9)),
        (nn.Sequential(nn.Conv1d(4, 12, 3, dilation=2, bias=False)), torch.randn(2, 4, 9)),
    ):
        weight = model[0].weight.detach().clone()
        u, s, v = np.linalg.svd(weight.flatten(1).numpy(), full_matrices=False)
        factorised = STRUCTURE.apply(model, {"0": "lowrank-0.5"}, lambda m, x=inputs: m(x))
        got = factorised(inputs)
        best = (u[:, : len(s) // 2] * s[: len(s) // 2]) @ v[: len(s) // 2]
        reference = nn.Sequential(type(model[0].into)(*_arguments(model[0].into, len(weight), model[0].out.bias)))
        with torch.no_grad():
            reference[0].weight.copy_(torch.from_numpy(best).view_as(weight))
            if model[0].out.bias is not None:
                reference[0].bias.copy_(model[0].out.bias)
        torch.testing.assert_close(got, reference(inputs), rtol=1e-3, atol=1e-4)


def _arguments(into: nn.Module, outputs: int, bias: object) -> list[object]:
    if isinstance(into, nn.Linear):
        return [into.in_features, outputs, bias is not None]
    assert isinstance(into, nn.modules.conv._ConvNd)
    shape = (into.in_channels, outputs, into.kernel_size, into.stride, into.padding, into.dilation, 1)
    return [*shape, bias is not None, into.padding_mode]


def test_copies_of_a_stack_share_out_the_channels_of_their_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 2))
    inputs = torch.randn(9, 6)
    block, expected = model[0], model[0](inputs)
    run = Calibration(Task(model, [], [], []), [(inputs, None)])
    stacked = STRUCTURE.apply(model, {"0": "stack-2"}, run)
    first, second = stacked[0].children()
    rows = {tuple(row.tolist()) for copy in (first, second) for row in copy[0].weight}
    assert rows == {tuple(row.tolist()) for row in block[0].weight}
    both = first(inputs) + second(inputs) - block[2].bias
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(stacked[0](inputs), (first(inputs) + second(inputs)) / 2)


def test_a_stacked_layer_begins_as_its_truncated_decomposition() -> None:
    torch.manual_seed(0)
    for layer, inputs in ((nn.Linear(40, 30), torch.randn(9, 40)), (nn.Conv2d(8, 30, 3), torch.randn(2, 8, 5, 5))):
        models = [nn.Sequential(copy.deepcopy(layer)) for _ in range(2)]
        run = Calibration(Task(models[0], [(inputs, torch.zeros(len(inputs)))], [], []), [(inputs, None)])
        stacked = STRUCTURE.apply(models[0], {"0": "stack-2x0.2"}, run)
        factorised = STRUCTURE.apply(models[1], {"0": "lowrank-0.4"}, run)
        torch.testing.assert_close(stacked(inputs), factorised(inputs), rtol=1e-3, atol=1e-4)
        assert [type(part).__name__ for part in stacked[0].children()] == ["LowRank", "LowRank"]
        with torch.no_grad():
            for part in stacked[0].children():
                part.bend.weight.fill_(0.0)  # a true ReLU: no layer can do this
        assert not torch.allclose(stacked(inputs), factorised(inputs), atol=0.01)


def test_a_layer_with_fewer_channels_than_a_stack_has_networks_is_still_what_it_was() -> None:
    inputs, layer = torch.randn(10, 6, 4, 4), nn.Sequential(nn.Conv2d(6, 1, 3), nn.ReLU())
    stacked = STRUCTURE.apply(copy.deepcopy(layer), {"0": "stack-3x0.25"}, lambda model: model(inputs))
    assert len(list(stacked[0].children())) == 3
    assert torch.allclose(stacked(inputs), layer(inputs), atol=1e-5)


def test_members_of_an_ensemble_share_out_what_is_within_the_heads() -> None:
    """Eight channels a head: of three members each has three of every head, as far as there are any."""
    workshop = workshop_of(zoo_task("transformer"))
    ensemble = candidate_of(workshop, {"model:structure": "stack-3"}).model
    widths = [len(member.encoder.layers[0].self_attn.q_proj.weight) for member in ensemble.children()]
    assert widths == [2 * 3, 2 * 3, 2 * 2]
    assert outputs(workshop.task, ensemble).shape == outputs(workshop.task, workshop.original).shape


def test_a_block_with_too_little_left_inside_is_no_stack() -> None:
    """One sentence; and for a probe it is the worst of choices, not the end of a trial."""
    workshop = workshop_of(zoo_task("spectral", 0))
    candidate = candidate_of(workshop, {"head.0:structure": "lowrank-0.25", "head.0:channels": 0.4})
    with pytest.raises(RecipeError, match=r"head cannot be made 'stack-2x0\.25': too few of its channels are left"):
        rebuilt(candidate, "head", "structure", "stack-2x0.25")
    effects = workshop.prober.effects(candidate, {"head:structure": ["stack-2x0.25", "drop"]})["head:structure"]
    assert effects["stack-2x0.25"] > 1000 > effects["drop"]


@pytest.mark.parametrize("epochs", [1, 0])
@pytest.mark.parametrize("name", ZOO)
def test_any_recipe_of_all_techniques_gives_a_file(
    name: str, epochs: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, rng = zoo_task(name, epochs), random.Random(0)
    workshop = Workshop(task, task.build(), SearchSpace.named("everything"), tmp_path, 0)
    for number, share in enumerate((0.05, 0.2, 0.5)):
        chosen = {d.key: rng.choice(d.choices) for d in workshop.space if rng.random() < share}
        result = workshop.finish(number, workshop.space.recipe(chosen))
        assert result.size_bytes == (tmp_path / "trials" / str(number) / "model.acz").stat().st_size
    assert "is not tried" not in caplog.text


def test_an_ensemble_of_narrow_members_learns() -> None:
    torch.manual_seed(0)
    task = small_digits()
    workshop = workshop_of(task)
    candidate = candidate_of(workshop, {"model:structure": "stack-2"})
    for _ in fine_tune(task, candidate, workshop.original, 4):
        pass
    assert len(list(candidate.model.children())) == 2
    assert measure(task, unpack(pack(candidate.weights(), candidate.recipe), task.build()), "val") > 0.85


def test_what_is_void_leaves_the_recipe() -> None:
    workshop = workshop_of(load_task("digits"))
    text = """
layers:
  "*": {structure: [keep, drop, stack-2x0.25], weights: [float32, int4], channels: [1.0, 0.5], activation_bits: [32, 8]}
model: {structure: [keep, stack-2]}
"""
    space = SearchSpace.parse(text).bind(workshop.anatomy)
    choices: dict[str, Choice] = {
        f"{layer}:{dimension}": choice
        for layer in ("block1.conv1", "stem.conv")
        for dimension, choice in (("weights", "int4"), ("channels", 0.5), ("activation_bits", 8))
    }
    stem = {"stem.conv:weights", "stem.conv:channels", "stem.conv:activation_bits"}
    dropped = space.recipe(choices | {"block1:structure": "drop"}).as_dict()
    assert set(dropped) == {"block1:structure", *stem}
    stacked = space.recipe(choices | {"block1:structure": "stack-2x0.25"}).as_dict()
    assert set(stacked) == {"block1:structure", "block1.conv1:weights", *stem}
    ensemble = space.recipe(choices | {"block1:structure": "drop", "model:structure": "stack-2"}).as_dict()
    assert set(ensemble) == {"model:structure", "stem.conv:weights", "block1.conv1:weights"}


def test_a_dropped_block_leaves_nothing_in_the_file() -> None:
    task = zoo_task("transformer")
    workshop = workshop_of(task)
    candidate = candidate_of(workshop, {"encoder.layers.1:structure": "drop"})
    assert not any(name.startswith("encoder.layers.1") for name in candidate.weights().layers)
    whole = candidate_of(workshop, {})
    left = len(pack(candidate.weights(), candidate.recipe)) / len(pack(whole.weights(), whole.recipe))
    assert left < 0.65


def test_tied_weights_share_their_choices() -> None:
    workshop = workshop_of(zoo_task("tied"))
    candidate = candidate_of(workshop, {"embed:weights": "int4", "embed:sparsity": 0.5})
    candidate.materialise()
    assert candidate.model.out.weight is candidate.model.embed.weight
    assert len(candidate.model.out.weight.unique()) <= 16
    assert [shadow.site for shadow in candidate.layers.values()].count("embed") == 1
    assert not any(site in ("embed", "out") for choice in CHOICES for site in sites(workshop, choice))


@pytest.mark.parametrize(
    ("before", "after"),
    list(itertools.product(["keep", "lowrank-0.5", "stack-2x0.25", "drop"], [*CHOICES, "lowrank-0.5"])),
)
def test_children_follow_their_parents(before: str, after: str) -> None:
    """A child is built from its parent's weights, with fewer channels too; where the technique allows."""
    if not STRUCTURE.follows(before, after):
        assert before != "keep"
        assert after not in (before, "drop")
        return
    task = zoo_task("transformer")
    workshop = workshop_of(task)
    linear = "lowrank" in before + after
    if linear and {"drop", "stack-2x0.25"} & {before, after}:
        return  # no part of this model can have both
    site = "into" if linear else "encoder.layers.1"
    parent = candidate_of(workshop, {f"{site}:structure": before, "encoder.layers.0.linear1:channels": 0.75})
    for shadow in parent.layers.values():
        shadow.dense.mul_(1.5)
    recipe: dict[str, Choice] = {f"{site}:structure": after, "encoder.layers.0.linear1:channels": 0.5}
    child = candidate_of(workshop, recipe, parent)
    assert child.model.get_submodule("encoder.layers.0.linear1").weight.shape[0] == 16
    if before == after:
        for name, shadow in child.layers.items():
            if "layers.0" not in name:
                assert torch.equal(shadow.dense, parent.layers[name].dense)
    decoded = unpack(pack(child.weights(), child.recipe), task.build())
    torch.testing.assert_close(outputs(task, decoded), outputs(task, child.model), rtol=1e-3, atol=1e-4)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.act = nn.Linear(8, 32), nn.ReLU()
        self.kind, self.place = nn.Linear(32, 3), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        hidden = self.act(self.body(x))
        return {"kind": self.kind(hidden), "boxes": [self.place(hidden)], "count": len(x)}


def test_members_of_an_ensemble_may_say_several_things() -> None:
    torch.manual_seed(0)
    model, data = TwoHeads().eval(), [(torch.randn(16, 8), torch.zeros(16))]
    loss = lambda out, target: out["kind"].square().mean() + out["boxes"][0].square().mean()  # noqa: E731
    workshop = workshop_of(Task(model, data, data, data, loss=loss, metric=lambda out, target: -float(loss(out, 0))))
    ensemble = candidate_of(workshop, {"model:structure": "stack-2"}).model
    output = ensemble(data[0][0])
    members = [member(data[0][0]) for member in ensemble.children()]
    assert len(members) == 2
    torch.testing.assert_close(output["kind"], (members[0]["kind"] + members[1]["kind"]) / 2)
    torch.testing.assert_close(output["boxes"][0], (members[0]["boxes"][0] + members[1]["boxes"][0]) / 2)
    assert output["count"] == 16


class Doubling(nn.Module):
    """Computes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x.mul_(2)).relu_())
        return out


def test_each_of_a_stack_is_given_the_same() -> None:
    x = torch.randn(4, 8)
    twice = Stack([Doubling(), Doubling()])
    expected = torch.stack([part(x.clone()) for part in twice.children()]).mean(0)
    out = twice(given := x.clone())
    torch.testing.assert_close(out, expected)
    assert torch.equal(given, 2 * x)  # as the module would have left it
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in twice.parameters())


def test_a_parts_layer_can_lose_channels() -> None:
    """The outputs of a factorised layer are channels as those of any other."""
    workshop = workshop_of(zoo_task("mlp"))
    candidate = candidate_of(workshop, {"1:structure": "lowrank-0.25", "1:channels": 0.5})
    assert [tuple(p.shape) for p in candidate.model.parameters()][:3] == [(8, 64), (16, 8), (16,)]
    assert candidate.model[3].weight.shape == (16, 16)


@pytest.mark.parametrize(
    "raw", ["stack-1", "stack-9", "stack-2x0.6", "lowrank-1", "lowrank-0", "lowrank-x", "remove", 2]
)
def test_what_makes_no_sense_is_refused(raw: object) -> None:
    with pytest.raises(SpaceError, match="does not exist; choose from keep, drop"):
        STRUCTURE.parse(raw)


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Remembering(nn.Module):
    """Adds up all that it was given, as attention does with a cache of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.seen.append(x)
        out: Tensor = self.down(self.up(torch.stack(cache.seen).sum(0)).relu())
        return out


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.head = Remembering(), Doubling(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.first(x * 1, Cache())))
        return out


def test_what_says_something_else_when_it_runs_again_is_not_stacked() -> None:
    data = [(torch.randn(16, 8), torch.zeros(16, dtype=torch.long))]
    found = sites(workshop_of(Task(WithCache(), data, data, data)), "stack-2x0.25")
    assert {"model", "body"} <= {*found}
    assert "first" not in found


def test_what_only_has_the_name_of_a_layer_is_not_factorised() -> None:
    named = type("Linear", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T.abs() + self.bias})
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), named(32, 32), nn.ReLU(), nn.Linear(32, 3))
    data = [(torch.randn(16, 32), torch.zeros(16, dtype=torch.long))]
    assert sites(workshop_of(Task(model, data, data, data)), "lowrank-0.25") == ["0", "4"]


def test_zoo_has_a_place_for_each() -> None:
    for choice in CHOICES:
        assert any(sites(workshop_of(zoo_task(name)), choice) for name in ZOO)


class Cast(nn.Module):
    """Computes in the dtype of its weights."""

    def __init__(self, inside: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inside, self.dtype = inside.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x.to(self.dtype))
        return out.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("choice", ["lowrank-0.25", "stack-2x0.25"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_parts_have_the_dtype_of_the_model(name: str, choice: str, dtype: torch.dtype) -> None:
    task = zoo_task(name)
    workshop = workshop_of(Task(Cast(task.build(), dtype), task.train, task.val, task.test, name="cast"))
    for site in sites(workshop, choice):
        candidate = candidate_of(workshop, {f"{site}:structure": choice})
        for made in (candidate, candidate_of(workshop, {f"{site}:structure": choice}, candidate)):
            assert {p.dtype for p in made.model.parameters()} == {dtype}
            assert outputs(task, made.model).isfinite().all()
