"""Channels that can only be removed together: what goes with what, and what stays as it was.

A channel that is silent is missed by nobody once it is removed, which tells whether the right ones went.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.artifact import load, pack, unpack
from autocompress.model.anatomy import read_anatomy
from autocompress.model.channel_graph import ChannelGraph
from autocompress.recipe import Recipe
from autocompress.space import SearchSpace
from autocompress.task import Calibration, Task
from autocompress.techniques.channels import Channels
from autocompress.techniques.importance import importance
from autocompress.trial.compression import Candidate
from autocompress.trial.workshop import Workshop
from tests.conftest import anatomy_of


def test_every_group_can_be_removed(any_task: Task) -> None:
    batch = next(any_task.batches("train"))

    def run(model: torch.nn.Module) -> torch.Tensor:
        return any_task.run(model, batch)[0]

    expected = run(any_task.build()).shape
    for group in anatomy_of(any_task).groups:
        model = any_task.build()
        graph = ChannelGraph(model, run)
        units = graph.coupled(group.name)
        graph.remove(group.name, sorted(itertools.chain(*units[: len(units) // 2])))
        assert run(model).shape == expected
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in any_task.build().parameters())


class Auxiliary(nn.Module):
    """Has a second head while it is trained, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3)
        self.head, self.second = nn.Linear(12, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.stem(x).relu()
        out: Tensor = self.head(self.body(middle).relu().mean((2, 3)))
        return (out, self.second(middle).mean((2, 3))) if self.training else out


class Shared(nn.Module):
    """Splits its channels into parts of a fixed size and uses as many as there are, as Res2Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(1, 16, 3), nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x).relu(), 4, 1)
        joined = torch.cat([layer(part) for layer, part in zip(self.parts, parts, strict=True)], 1)
        out: Tensor = self.head(joined.relu().mean((2, 3)))
        return out


class Ghost(nn.Module):
    """Computes half of its channels of the others, and adds those of a shortcut (GhostNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shortcut, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x).relu()
        joined = torch.cat([y, self.cheap(y)], 1) + self.shortcut(x)
        out: Tensor = self.head(joined.relu().mean((2, 3)))
        return out


def test_channels_that_are_found_twice_go_together() -> None:
    def run(model: nn.Module) -> object:
        return model(torch.zeros(4, 1, 9, 9))

    model = Ghost().eval()
    (group,) = read_anatomy(model, run).groups
    assert ChannelGraph(model, run).coupled(group.name) == [[c, c + 8] for c in range(8)]
    with torch.no_grad():
        model.primary.weight.mul_(1e-3)  # all of them are weaker than what is computed of them
    batches = [(torch.randn(8, 1, 9, 9), torch.zeros(8, dtype=torch.long))]
    Channels().apply(model, {group.name: 6}, Calibration(Task(model, batches, batches, batches), batches))
    assert [layer.out_channels for layer in (model.primary, model.cheap, model.shortcut)] == [3, 3, 6]
    run(model)


class Normed(nn.Module):
    """Norms of groups: of three and of two over the same channels, of two over those of two layers, and of all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.three, self.two = nn.Conv2d(1, 24, 3, padding=1), nn.GroupNorm(3, 24), nn.GroupNorm(2, 24)
        self.left, self.right, self.both = nn.Conv2d(24, 8, 1), nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 16)
        self.body, self.one, self.head = nn.Conv2d(16, 6, 3), nn.GroupNorm(1, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.three(self.stem(x)).relu()).relu()
        joined = self.both(torch.cat([self.left(y), self.right(x)], 1)).relu()
        out: Tensor = self.head(self.one(self.body(joined)).relu().mean((2, 3)))
        return out


def test_each_group_of_a_norm_loses_as_many_channels() -> None:
    batches = [(torch.randn(8, 1, 9, 9), torch.zeros(8, dtype=torch.long))]
    task = Task(Normed(), batches, batches, batches)
    model, run = task.build().eval(), Calibration(task, batches)
    anatomy, graph = read_anatomy(model, run), ChannelGraph(model, run)
    assert [group.name for group in anatomy.groups] == ["stem", "body"]
    assert all("both (GroupNorm)" in anatomy.left_alone[name] for name in ("left", "right"))
    assert graph.coupled("stem") == [[*range(c, 24, 4)] for c in range(4)]
    assert len(graph.coupled("body")) == 6
    candidate = Candidate(model, anatomy, Recipe.of({"stem:channels": 0.6, "body:channels": 0.5}), run)
    assert [candidate.model.get_submodule(n).num_channels for n in ("three", "two", "one")] == [12, 12, 3]
    decoded = unpack(pack(candidate.weights(), candidate.recipe), Normed)
    assert torch.equal(run(decoded.eval()), run(candidate.model.eval()))
    assert decoded.three.num_channels == 12


class Segmenter(nn.Module):
    """As nnU-Net and MONAI build them: norms of instances, slopes that are learned, joined channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 12, 2, 2)
        self.up, self.joined, self.head = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(16, 6, 3, 1, 1), nn.Conv2d(6, 2, 1)
        self.norms = nn.ModuleList(nn.InstanceNorm2d(n, affine=True) for n in (8, 12, 8, 6))
        self.slopes = nn.ModuleList(nn.PReLU() for _ in self.norms)
        self.unscaled = nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        first = self.slopes[0](self.norms[0](self.stem(x)))
        below = self.slopes[1](self.norms[1](self.down(first)))
        up = self.unscaled(self.slopes[2](self.norms[2](self.up(below)) + first))
        out: Tensor = self.head(self.slopes[3](self.norms[3](self.joined(torch.cat([up, first], 1)))))
        return out


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
def test_what_is_silent_is_missed_by_nobody_once_it_is_removed() -> None:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(x)
        return out

    model = Segmenter().double().eval()
    groups = read_anatomy(model, run).groups
    assert [group.name for group in groups] == ["stem", "down", "joined"]
    graph = ChannelGraph(model, run)
    for group in groups:
        channel = group.channels // 3
        with torch.no_grad():
            for maker in graph.makers(group.name):
                weight, bias = maker.weight, maker.bias
                assert isinstance(weight, Tensor)
                assert isinstance(bias, Tensor)
                weight.select(1 if isinstance(maker, nn.ConvTranspose2d) else 0, channel).zero_()
                bias[channel] = 0
        before = run(model)
        graph.remove(group.name, [channel])
        torch.testing.assert_close(run(model), before)
    assert [norm.weight.numel() for norm in model.norms] == [7, 11, 7, 5]


class Halves(nn.Module):
    """As in YOLO: one half of the channels goes on as it is, of the other one block after another is computed."""

    def __init__(self, sizes: tuple[int, int] | int) -> None:
        super().__init__()
        self.sizes, self.into = sizes, nn.Conv2d(1, 16, 3, padding=1)
        layers = [(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(*parts) for parts in layers)
        self.join, self.head = nn.Conv2d(32, 12, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).relu()
        parts = [*(x.chunk(2, 1) if self.sizes == 8 else x.split(self.sizes, 1))]
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        out: Tensor = self.head(self.join(torch.cat(parts, 1)).relu().mean((2, 3)))
        return out


@torch.no_grad()
def test_halves_of_channels_lose_as_many_each() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(x)
        return out

    model = Halves(8).double().eval()
    assert {g.name: g.channels for g in read_anatomy(model, run).groups} == {
        "into": 16,
        "blocks.0.0": 6,
        "blocks.1.0": 6,
        "join": 12,
    }
    graph = ChannelGraph(model, run)
    assert graph.coupled("into") == [[at, 8 + at] for at in range(8)]
    for layer, channels in ((model.into, [3, 11]), (model.blocks[0][2], 3), (model.blocks[1][2], 3)):
        layer.weight[channels], layer.bias[channels] = 0, 0
    before = run(model)
    graph.remove("into", [3, 11])
    torch.testing.assert_close(run(model), before)
    assert model.join.weight.shape == (12, 28, 1, 1)


class SplitFunction(torch.autograd.Function):
    """Splits, as its name in the graph of gradients says, and tells nothing else."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :4].clone(), x[:, 4:].clone()

    @staticmethod
    def backward(context: Any, *parts: Any) -> Any:
        return torch.cat(parts, 1)


class Parted(nn.Module):
    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.cut, self.into, self.both, self.head = cut, nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(sum(self.both(part) for part in self.cut(self.into(x))))
        return out


SPLITS: dict[str, Callable[[Tensor], Any]] = {
    "of one's own": SplitFunction.apply,
    "unsafe": lambda x: torch.unsafe_chunk(x, 2, 1),
    "by slices": lambda x: x.tensor_split(2, 1),
    "the last part alone": lambda x: x.chunk(2, 1)[1:],
}


@pytest.mark.parametrize("cut", SPLITS.values(), ids=SPLITS)
def test_whatever_splits_channels_the_rest_is_followed(cut: Any) -> None:
    anatomy = read_anatomy(Parted(cut).eval(), lambda model: model(torch.randn(5, 6)))
    assert "both" in {group.name for group in anatomy.groups}


def test_parts_of_sizes_that_the_code_knows_are_left_alone() -> None:
    x = torch.randn(2, 1, 8, 8)
    anatomy = read_anatomy(Halves((8, 8)).eval(), lambda model: model(x))
    assert "into" not in {group.name for group in anatomy.groups}


class Attention(nn.Module):
    """Of so many heads, or of so many as there are of a width that is known."""

    def __init__(self, heads: int, width: int, places: int = 6) -> None:
        super().__init__()
        self.heads, self.width, self.places = heads, width, places
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (part(x).view(len(x), self.places, self.heads, self.width) for part in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)
        said = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        out: Tensor = self.o(said.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(
    ("shape", "first"),
    [((3, -1), [0, 4, 8]), ((-1, 4), [0, 1, 2, 3]), ((3, 4), None), ((3, 4, -1), None)],
    ids=["one of each head", "a whole head", "neither", "fewer places"],
)
def test_heads_become_narrower_or_fewer(shape: tuple[int, ...], first: list[int] | None) -> None:
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))

    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(x)
        return out

    model = nn.Sequential(Attention(*shape), nn.Linear(12, 3)).eval()
    anatomy = read_anatomy(model, run)
    assert [group.name for group in anatomy.groups] == (["0.q", "0.o"] if first else ["0.o"])
    if first:
        graph = ChannelGraph(model, run)
        assert graph.coupled("0.q")[0] == first
        with torch.no_grad():
            for part in (model[0].q, model[0].k, model[0].v):
                part.weight[first], part.bias[first] = 0, 0
        before = run(model)
        graph.remove("0.q", first)
        torch.testing.assert_close(run(model), before)
        assert tuple(model[0].o.weight.shape) == (12, 12 - len(first))
        again = ChannelGraph(model, run)
        while len(together := again.coupled("0.q")) > 1:
            assert {len(unit) for unit in together} == {len(first)}
            again.remove("0.q", together[0])
            again = ChannelGraph(model, run)
        assert together == [[*range(len(first))]]


class Speaker(nn.Module):
    """Says words by the table that it reads them by. apart: not what it reads, but only what is made of it."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.table, self.apart = nn.Embedding(20, 8), apart
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.down(self.up(x).relu())
        out: Tensor = self.out(y if self.apart else x + y)[:, -1]
        return out


@pytest.mark.parametrize("apart", [False, True])
def test_a_shared_weight_loses_the_same_channels_wherever_it_is(apart: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, model = torch.randint(0, 20, (32, 5)), Speaker(apart).eval()
    with torch.no_grad():
        model.table.weight[:, 2:4] = 0
        model.down.weight[2:4], model.down.bias[2:4] = 0, 0
    before, graph = model(ids), ChannelGraph(model, lambda model: model(ids))
    assert graph.coupled("down") == [[channel] for channel in range(8)]
    graph.remove("down", [2, 3])
    torch.testing.assert_close(model(ids), before)
    assert model.out.weight is model.table.weight
    assert model.out.weight.shape == (20, 6)
    data = [(ids, torch.randint(0, 20, (32,)))]
    for epochs in (1, 0):
        task = Task(Speaker(apart), data, data, data, epochs=epochs)
        workshop = Workshop(task, task.build(), SearchSpace.named("default"), tmp_path, 0)
        for number, share in enumerate((0.7, 0.4)):
            workshop.finish(number, workshop.space.recipe({"down:channels": share}), number - 1 if number else None)
            decoded = load(tmp_path / "trials" / str(number) / "model.acz", task.build())
            assert decoded.out.weight is decoded.table.weight
            assert decoded.table.embedding_dim == decoded.out.in_features == round(8 * share)


def test_a_shared_weight_that_has_channels_in_another_order_keeps_them() -> None:
    class Swapped(Speaker):
        def forward(self, ids: Tensor) -> Tensor:
            left, right = self.down(self.up(self.table(ids)).relu()).chunk(2, -1)
            out: Tensor = self.out(torch.cat([right, left], -1))[:, -1]
            return out

    ids = torch.randint(0, 20, (3, 5))
    anatomy = read_anatomy(Swapped().eval(), lambda model: model(ids))
    assert [group.name for group in anatomy.groups] == ["up"]
    assert anatomy.left_alone["down"] == "its channels pass through out, which shares a weight with another layer"


class Width(nn.Module):
    """Embeddings, a norm and a scale of its own have one width in common."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 8), norm or nn.RMSNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.linspace(1, 2, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        out: Tensor = self.head((x + self.scale * self.down(self.up(self.norm(x)).relu())).mean(1))
        return out


def test_channels_of_a_models_own_parameters_can_go() -> None:
    ids = torch.arange(40).view(4, 10) % 20
    batches = [(ids, torch.zeros(4, dtype=torch.long))]
    task = Task(Width(), batches, batches, batches)
    model, run = task.build().eval(), Calibration(task, batches)
    anatomy, before = read_anatomy(model, run), run(model)
    assert [group.name for group in anatomy.groups] == ["up", "down"]
    graph = ChannelGraph(model, run)
    for _ in range(2):
        whole = graph.snapshot()
        graph.remove("down", [1, 3, 4])
        assert (model.scale.shape, model.norm.normalized_shape, model.table.embedding_dim) == ((5,), (5,), 5)
        run(model)
        graph.restore(whole)
        assert torch.equal(run(model), before)
    candidate = Candidate(model, anatomy, Recipe.of({"up:channels": 0.5, "down:channels": 0.5}), run)
    decoded = unpack(pack(candidate.weights(), candidate.recipe), Width).eval()
    assert torch.equal(run(decoded), run(candidate.model.eval()))
    assert (decoded.scale.shape, decoded.norm.normalized_shape, decoded.table.embedding_dim) == ((4,), (4,), 4)


def test_a_norm_without_tensors_keeps_its_width() -> None:
    """Nothing in the file would tell it."""
    bare = Width(nn.LayerNorm(8, elementwise_affine=False)).eval()
    anatomy = read_anatomy(bare, lambda model: model(torch.arange(10)[None]))
    assert anatomy.left_alone["down"] == "its channels pass through norm (LayerNorm)"


def test_a_gate_goes_with_what_it_opens() -> None:
    def run(model: nn.Module) -> object:
        return model(torch.zeros(4, 5, 6))

    model = nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 3)).eval()
    assert [group.name for group in read_anatomy(model, run).groups] == ["0"]
    graph = ChannelGraph(model, run)
    assert graph.coupled("0") == [[c, c + 8] for c in range(8)]
    graph.remove("0", [2, 10])
    assert tuple(model[2].weight.shape) == (3, 7)
    run(model)


class Gated(nn.Module):
    """A gate behind a token of class, which is joined to the others where a convolution has its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.both, self.out = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        opened, gate = self.both(x).chunk(2, -1)
        out: Tensor = self.out(opened * nn.functional.gelu(gate))
        return out


def test_a_gate_behind_a_token_of_class_goes_with_what_it_opens() -> None:
    model, x = Gated().eval(), torch.randn(4, 5, 6)
    graph = ChannelGraph(model, lambda m: m(x))
    assert graph.coupled("both") == [[c, c + 8] for c in range(8)]


def test_channels_behind_a_norm_of_several_dimensions_are_ranked() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm((5, 8)), nn.Linear(8, 2))
    batches = [(torch.randn(4, 5, 3), torch.zeros(4, 5, 2))]
    run = Calibration(Task(model, batches, batches, batches), batches)
    for criterion in ("l2", "lamp", "geometric-median", "activation"):
        assert importance(criterion, ChannelGraph(model, run), "0", run).shape == (8,)


class Shuffled(nn.Module):
    """Mixes the halves of its channels from unit to unit (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for unit in self.units:
            kept, changed = x.chunk(2, 1)
            x = torch.cat([kept, unit(changed)], 1)
            count, channels, height, width = x.shape
            x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


INSIDE = [f"units.{unit}.0" for unit in range(3)]


@pytest.mark.parametrize(("kind", "free"), [(Auxiliary, ["body"]), (Shared, []), (Shuffled, INSIDE)])
def test_groups_can_be_removed_together_and_the_model_still_trains(kind: type[nn.Module], free: list[str]) -> None:
    def run(model: nn.Module) -> object:
        return model(torch.zeros(4, 1, 9, 9))

    model = kind().eval()
    groups = [group.name for group in read_anatomy(model, run).groups]
    assert set(free) <= set(groups)
    graph = ChannelGraph(model, run)
    for name in groups:
        graph.remove(name, list(range(graph.channels(name) // 2)))
    run(model)
    run(model.train())


def test_a_group_is_the_same_when_it_alone_is_looked_at(any_task: Task) -> None:
    batch = next(any_task.batches("train"))
    cases = [
        (any_task.build(), lambda m: any_task.run(m, batch)[0]),
        (Ghost().eval(), lambda m: m(torch.zeros(2, 1, 9, 9))),
    ]
    for model, run in cases:
        every = ChannelGraph(model, run)
        for name in every.groups:
            alone = ChannelGraph(model, run, only=[name])
            assert [*alone.groups] == [name]
            assert alone.coupled(name) == every.coupled(name)
            assert sorted(alone.members(name)) == sorted(every.members(name))


class Settings(dict[str, int]):
    """As diffusers keeps them in its models: a dict that has more to it, which a copy would lose."""


def test_what_was_removed_can_be_put_back(any_task: Task) -> None:
    batch, model = next(any_task.batches("train")), any_task.build()
    vars(model)["settings"] = settings = Settings(width=8)
    expected = any_task.run(model, batch)[0]
    graph = ChannelGraph(model, lambda m: any_task.run(m, batch)[0])
    for name in graph.groups:
        before = graph.snapshot()
        graph.remove(name, list(range(graph.channels(name) // 2)))
        graph.restore(before)
        assert torch.equal(any_task.run(model, batch)[0], expected)
    assert vars(model)["settings"] is settings
