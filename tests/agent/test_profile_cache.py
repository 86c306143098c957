"""A profile is measured once for the same model, data and space, and again when any of them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import search
from autocompress.agent.profile_cache import measured_profile
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.trial import probing
from autocompress.trial.workshop import Workshop
from tests.conftest import small_digits


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Workshop]:
    """The workshops that really measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[Workshop] = []
    measure = Workshop.base_profile

    def spy(self: Workshop, *given: Any, **named: Any) -> object:
        seen.append(self)
        return measure(self, *given, **named)

    monkeypatch.setattr(Workshop, "base_profile", spy)
    return seen


def workshop(task: Task, space: str = "layers: {'*': {weights: [float32, int4]}}") -> Workshop:
    return Workshop.on(task, SearchSpace.parse(space), Path())


def test_the_same_is_measured_once(measurements: list[Workshop]) -> None:
    first, second = measured_profile(workshop(small_digits())), measured_profile(workshop(small_digits()))
    assert first == second
    assert len(measurements) == 1


def test_no_home_costs_no_profile(
    measurements: list[Workshop], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured_profile(workshop(small_digits()))["effects"]
    assert len(measurements) == 1


def test_another_model_sample_or_space_is_measured_again(measurements: list[Workshop]) -> None:
    measured_profile(workshop(small_digits()))
    other = small_digits()
    assert isinstance(other.model, torch.nn.Module)
    model = other.build()
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    changed = Task(model, other.train, other.val, other.test, name=other.name)
    measured_profile(workshop(changed))
    sample = list(other.batches("train"))[1:]
    measured_profile(workshop(Task(other.model, sample, other.val, other.test, name=other.name)))
    measured_profile(workshop(small_digits(), "layers: {'*': {weights: [float32, int3]}}"))
    assert len(measurements) == 4


class Graph(nn.Module):
    """Of nodes and a sparse matrix of their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, nodes: Tensor, neighbours: Tensor) -> Tensor:
        out: Tensor = self.head(neighbours @ self.into(nodes).relu())
        return out


def test_batches_may_hold_sparse_tensors(measurements: list[Workshop]) -> None:
    torch.manual_seed(0)
    model, nodes = Graph(), torch.randn(20, 8)
    for _ in range(2):
        graphs = [torch.eye(20).to_sparse(), (torch.eye(20) + torch.eye(20).roll(1, 0)).to_sparse()]
        batches = [((nodes, graph), model(nodes, graph).argmax(1)) for graph in graphs]
        for given in (batches, batches, batches[::-1]):
            measured_profile(workshop(Task(model, given, batches, batches)))
    assert len(measurements) == 2


def test_a_broken_file_in_the_cache_is_measured_again(measurements: list[Workshop], tmp_path: Path) -> None:
    known = measured_profile(workshop(small_digits()))
    (file,) = (tmp_path / "autocompress" / "profiles").iterdir()
    file.write_text("{")
    assert measured_profile(workshop(small_digits())) == known
    assert len(measurements) == 2


def test_progress_is_told() -> None:
    told: list[float] = []
    Workshop.on(small_digits(), SearchSpace.named("default"), Path()).base_profile(told.append)
    assert told[0] == 0.1
    assert told == sorted(set(told))
    assert len(told) >= 5


def test_parts_that_were_measured_apart_are_the_whole() -> None:
    one = Workshop.on(small_digits(), SearchSpace.named("default"), Path())
    whole, joined = one.base_profile(), one.joined_profile([one.profile_part(i, 3) for i in (1, 0, 2)])
    assert joined == whole
    assert [*joined["effects"]] == [*whole["effects"]], "in the same order: the sampler draws along it"


@pytest.mark.parametrize(("most", "probes"), [(42, 6 * 7), (41, 7 + 4 + 7), (17, 7 + 5), (11, 7)])
def test_beyond_many_probes_alike_layers_are_probed_together(most: int, probes: int) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 32) for _ in range(5)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32, 3))
    for weight in model.parameters():
        weight.data *= 2
    batches = [(torch.randn(256, 32), torch.randint(0, 3, (256,)))]
    space = "layers: {'*': {weights: [float32, int8, int6, int5, int4, int3, int2]}}"
    one = workshop(Task(model, batches, batches, batches), space)
    exact = one.base_profile()["effects"]
    assert sum(len(choices) for choices in probing.needed_choices(one.space, one.anatomy, most).values()) == probes
    guessed = one.base_profile(probes=most)["effects"]
    assert guessed.keys() == exact.keys()
    for key, effects in exact.items():
        if probes > len(effects):  # the middle choice of each
            assert guessed[key]["int5"] == effects["int5"]
        for choice in ("int4", "int3", "int2"):
            assert 0.2 < guessed[key][choice] / effects[choice] < 5, "they differ by hundreds from int5 to int2"


def test_a_profile_of_fewer_probes_is_enough_for_whoever_asks_for_no_more(measurements: list[Workshop]) -> None:
    def coarse() -> dict[str, Any]:
        return workshop(small_digits()).base_profile(probes=5)

    few = measured_profile(workshop(small_digits()), coarse, 5)
    assert measured_profile(workshop(small_digits()), dict, 5) == few
    whole = measured_profile(workshop(small_digits()))
    assert whole["probes"] > few["probes"]
    for probes in (5, probing.MANY_PROBES):
        assert measured_profile(workshop(small_digits()), dict, probes) == whole
    assert len(measurements) == 2


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_short_search_tries_no_more_choices_than_are_worth_its_while(
    epochs: int, measurements: list[Workshop], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 16), torch.randint(0, 16, (64,)))] * 4
    layers = (torch.nn.Linear(16, 16) for _ in range(20))
    task = Task(torch.nn.Sequential(*layers), batches, batches, batches, epochs=epochs)
    one = Workshop.on(task, SearchSpace.named("default"), tmp_path)
    every = probing.choice_count(probing.needed_choices(one.space, one.anatomy))
    assert one.trial_probes() == (4 if epochs else 50), "three passes of four batches, for each pass of three"
    search(task, budget=1, workers=1, run=tmp_path / "run", quiet=True)
    tried = json.loads((tmp_path / "run" / "profile.json").read_text())["probes"]
    assert 0 < tried <= 400 < every
