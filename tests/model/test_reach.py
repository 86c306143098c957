"""Heads of an attention that nobody follows: found by trying, and removed with all that is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.artifact import load
from autocompress.model.anatomy import read_anatomy
from autocompress.model.channel_graph import ChannelGraph
from autocompress.model.reach import reaches
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.techniques.importance import Importance, importance
from autocompress.trial.workshop import Workshop

WIDTH, DIM, HEADS, SHARED = 12, 4, 4, 2


class Rotary(nn.Module):
    """As Llama has it: places turn queries and keys; two queries share a key and a value. kind: "mixed" heads see each
    other's weights, each "told" head sees less of what is far, by its number."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, SHARED * DIM), nn.Linear(WIDTH, SHARED * DIM)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.kind, self.mix = kind, nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1])[:, None] / torch.tensor([1, 7])
        turn = torch.cat([angle, angle], 1)
        q, k = (z * turn.cos() + torch.cat([-z[..., 2:], z[..., :2]], -1) * turn.sin() for z in (q, k))
        k, v = (z.repeat_interleave(HEADS // SHARED, 1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) / 2
        if self.kind == "mixed":
            scores = torch.einsum("gh,bhqk->bgqk", self.mix, scores)
        if self.kind == "told":
            far = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
            scores = scores - far * 2.0 ** -torch.arange(q.shape[1])[:, None, None]
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(self.up(x).relu())
        return out


def model_of(kind: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, WIDTH), Rotary(kind), Rotary(), nn.Flatten(), nn.Linear(6 * WIDTH, 3)).eval()


def run(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(1)))
    return out


def test_queries_go_with_the_key_that_they_share() -> None:
    model = model_of()
    linear: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    state = torch.random.get_rng_state()
    queries = [layer for layer in linear if layer in (model[1].q, model[2].q)]
    first, second = reaches(model, run, linear, queries)
    assert torch.equal(state, torch.random.get_rng_state())
    for found, attention in ((first, model[1]), (second, model[2])):
        assert (found.makers, found.taker) == ((attention.q, attention.k, attention.v), attention.o)
        eight, four = [*range(8)], [*range(4)]
        assert found.units[0] == ((eight, four, four), eight)
        assert found.units[1] == (([c + 8 for c in eight], *[[c + 4 for c in four]] * 2), [c + 8 for c in eight])
    assert reaches(model, run, linear, [*second.makers[1:2]]) == [second]
    assert reaches(model, run, {*linear} - {second.makers[1]}, queries) == [first]
    mixed = model_of("mixed")
    taken = [found.taker for found in reaches(mixed, run, [*mixed.modules()], [*mixed.modules()])]
    assert mixed[1].o not in taken
    assert mixed[2].o in taken


def test_channels_that_go_one_by_one_are_units_too() -> None:
    model = model_of()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    (found,) = reaches(model, run, linear, [layer for layer in linear if layer.out_features == 20][:1])
    assert found.units == tuple((([channel],), [channel]) for channel in range(20))


def test_the_model_misses_no_silent_head() -> None:
    model = model_of()
    graph = ChannelGraph(model, run)
    assert {"1.q", "2.q"} <= graph.groups.keys()
    assert not graph.refused
    assert graph.members("1.q") == [("1.q", "out"), ("1.k", "out"), ("1.v", "out"), ("1.o", "in")]
    assert graph.coupled("1.q") == [[*range(8)], [*range(8, 16)]]
    with torch.no_grad():
        model[1].o.weight[:, 8:] = 0
    before, snapshot = run(model), graph.snapshot()
    for _ in range(2):  # a snapshot lasts
        graph.remove("1.q", [*range(8, 16)])
        assert [tuple(layer.weight.shape) for layer in (model[1].q, model[1].k, model[1].o)] == [
            (8, 12),
            (4, 12),
            (12, 8),
        ]
        torch.testing.assert_close(run(model), before)
        graph.restore(snapshot)
        assert model[1].q.weight.shape == (16, 12)
    assert ChannelGraph(model, run, only=["2.q"]).coupled("2.q") == graph.coupled("2.q")


@pytest.mark.parametrize("kind", ["mixed", "told"])
def test_heads_that_know_of_each_other_or_of_their_number_stay(kind: str) -> None:
    anatomy = read_anatomy(model_of(kind), run)
    assert [group.name for group in anatomy.groups if group.name.endswith("q")] == ["2.q"]
    assert {"1.q", "1.k", "1.v"} & anatomy.left_alone.keys()


@pytest.mark.parametrize("criterion", Importance().examples())
def test_heads_are_ranked_by_every_criterion(criterion: str) -> None:
    model = model_of()
    data = [(torch.randn(4, 6, 8), torch.zeros(4, dtype=torch.long))]
    workshop = Workshop(Task(model, data, data, data), model, SearchSpace.named("default"), Path(), 0)
    values = importance(criterion, ChannelGraph(model, run), "1.q", workshop.calibration)
    assert values.shape == (16,)
    assert values.isfinite().all()


@pytest.mark.parametrize("epochs", [1, 0])
def test_a_trial_with_fewer_heads_and_its_child(epochs: int, tmp_path: Path) -> None:
    model = model_of()
    inputs = torch.randn(32, 6, 8)
    data = [(inputs, model(inputs).argmax(1))]
    task = Task(model, data, data, data, epochs=epochs)
    workshop = Workshop(task, task.build(), SearchSpace.named("default"), tmp_path, 0)
    sizes = [
        workshop.finish(number, workshop.space.recipe(chosen), number - 1 if number else None).size_bytes
        for number, chosen in enumerate([{}, {"1.q:channels": 0.55}, {"1.q:channels": 0.55, "2.q:channels": 0.55}])
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    smaller = load(tmp_path / "trials" / "2" / "model.acz", task.build())
    assert [smaller[at].q.out_features for at in (1, 2)] == [8, 8]
    assert F.cross_entropy(smaller(inputs), data[0][1]).isfinite()
