from __future__ import annotations

import itertools
import sys
from collections import UserDict, namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autocompress.agent.run_folder import create_run
from autocompress.errors import TaskError
from autocompress.task import (
    Calibration,
    Task,
    accuracy,
    batch_count,
    batch_size,
    check_task,
    first_samples,
    load_task,
    measure,
    to_device,
)
from autocompress.techniques.stack import Stack
from tests.conftest import zoo_task

BATCH = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))


def linear_task(**changes: Any) -> Task:
    settings: dict[str, Any] = {"model": nn.Linear(3, 2), "train": [BATCH], "val": [BATCH], "test": [BATCH]}
    return Task(**{**settings, **changes})


class Sum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 2), torch.ones(2, 2)), {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}]
)
def test_inputs_are_spread_over_the_model(inputs: Any) -> None:
    task = linear_task(model=Sum())
    output, target = task.run(task.build(), (inputs, 7))
    assert output.tolist() == [[2, 2], [2, 2]]
    assert target == 7


class SumOfOne(nn.Module):
    """Takes all that it adds as one."""

    def forward(self, given: Any) -> torch.Tensor:
        a, b = given.values() if isinstance(given, dict) else given
        out: torch.Tensor = a + b
        return out


@pytest.mark.parametrize("inputs", [[torch.ones(2, 2)] * 2, {"a": torch.ones(2, 2), 7: torch.ones(2, 2)}])
def test_inputs_stay_as_one_where_the_model_takes_only_that(inputs: Any) -> None:
    task = linear_task(model=SumOfOne())
    for model in (task.build(), Stack([task.build(), task.build()])):
        assert task.run(model, (inputs, 7))[0].tolist() == [[2, 2], [2, 2]]
    with pytest.raises(TypeError, match="unexpected keyword argument 'c'"):
        linear_task(model=Sum()).run(Sum(), ({"a": torch.ones(2), "c": torch.ones(2)}, 7))


class TwoHeads(nn.Module):
    """Has a second head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return (self.first(x), self.second(x)) if self.training else self.first(x)


def test_a_loss_that_does_not_take_what_comes_out_in_training_is_told_at_once() -> None:
    task = linear_task(model=TwoHeads())
    model = task.build()
    with pytest.raises(TaskError, match="a batch of the train split does not run in training: TypeError"):
        check_task(task, model)
    assert not model.training
    check_task(linear_task(model=TwoHeads(), epochs=0), model)


def test_batches_without_a_length_are_counted_once() -> None:
    class Stream:
        read = 0

        def __iter__(self) -> Iterator[Any]:
            for _ in range(3):
                self.read += 1
                yield BATCH

    stream = Stream()
    task = linear_task(train=stream)
    assert [batch_count(task), batch_count(task), stream.read] == [3, 3, 3]
    task.train = lambda: iter(stream)
    assert [batch_count(task), batch_count(task), stream.read] == [3, 3, 6]
    task.train = lambda: [BATCH, BATCH]
    assert batch_count(task) == 2


def test_any_other_batch_through_forward() -> None:
    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        return model(batch["x"]), batch["y"]

    batches = [{"x": BATCH[0], "y": BATCH[1]}]
    task = linear_task(train=batches, val=batches, test=batches, forward=forward)
    check_task(task, task.build())
    assert 0 <= measure(task, task.build(), "val") <= 1


class Fields(UserDict[str, Any]):
    """As tokenizers hand over: a mapping that is no dict."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class Graph:
    """Knows by itself how to move, as graph libraries' batches do."""

    device = "cpu"

    def to(self, device: torch.device) -> Graph:
        moved = Graph()
        moved.device = str(device)
        return moved


def test_batches_of_any_kind_are_moved_and_keep_their_types() -> None:
    pair = namedtuple("pair", "left right")
    batch = Fields(x=torch.zeros(3, 2), more=[pair(torch.ones(3), "text"), Graph()])
    assert batch_size(batch) == 3
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, Fields)
    assert moved.x.is_meta
    assert moved.more[0].left.is_meta
    assert moved.more[0].right == "text"
    assert moved.more[1].device == "meta"
    assert not batch.x.is_meta
    few = first_samples(batch, 2)
    assert (few.x.shape, few.more[0].left.shape) == ((2, 2), (2,))
    graph = torch.eye(3).to_sparse()
    assert first_samples((torch.zeros(3, 2), graph), 2)[1] is graph, "what is no row for each sample cannot be cut"


def test_structure_is_read_from_few_samples_where_the_model_runs_with_them() -> None:
    task = linear_task()
    calibration = Calibration(task, [BATCH])
    assert batch_size(calibration.shortened(task.build()).batches[0]) == 2
    picky = nn.Sequential(nn.Flatten(0), nn.Linear(BATCH[0].numel(), 2), nn.Unflatten(0, (1, 2)))
    assert calibration.shortened(picky) is calibration


@pytest.mark.parametrize(("output", "target"), [((8, 1), (8, 1)), ((8,), (8,)), ((8, 3), (8, 1)), ((8, 5, 3), (8, 5))])
def test_accuracy_is_of_classes(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Of one logit the largest is always the first, and [8] and [8, 1] would be compared all with all."""
    with pytest.raises(TaskError, match=r"takes outputs \[N, C, ...\] .*, got .*: give metric="):
        accuracy(torch.randn(output), torch.zeros(target))
    assert accuracy(torch.eye(3)[:, :, None], torch.tensor([[0], [1], [0]])) == pytest.approx(2 / 3)


def test_the_metric_is_weighted_by_batch_size() -> None:
    batches = [(torch.zeros(1, 3), torch.zeros(1)), (torch.ones(3, 3), torch.zeros(3))]
    task = linear_task(val=batches, metric=lambda output, target: float(len(target) == 3))
    assert measure(task, task.build(), "val") == 0.75


def test_as_many_right_answers_are_as_good_in_whichever_batches() -> None:
    inputs = torch.zeros(3 * 7, 2)
    inputs[:, 1] = 1.0
    labels = torch.zeros(3 * 7, dtype=torch.int64)

    def measured(right: Sequence[int]) -> float:
        targets = labels.clone()
        targets[list(right)] = 1
        batches = list(zip(inputs.split(7), targets.split(7), strict=True))
        return measure(Task(nn.Identity(), train=batches, val=batches, test=batches), nn.Identity(), "val")

    assert len({measured(right) for right in itertools.combinations(range(0, 21, 2), 5)}) == 1


def test_measuring_leaves_the_mode_alone() -> None:
    task = linear_task()
    model = task.build().train()
    measure(task, model, "val")
    assert model.training


def test_a_function_gives_fresh_batches_each_time() -> None:
    task = linear_task(val=lambda: iter([BATCH]))
    assert measure(task, task.build(), "val") == measure(task, task.build(), "val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "the train loader gave no batches"),
        ({"test": list}, "the test loader gave no batches"),
        ({"loss": lambda output, target: output.sum() * float("nan")}, "the loss on the train split is nan"),
        ({"val": [(torch.randn(4, 9), BATCH[1])]}, "a batch of the val split does not run"),
        ({"train": [BATCH[0][0, 0]]}, "a batch must be"),
        ({"model": lambda: "no model"}, "must return an nn.Module, got str"),
        ({"model": lambda: 1 / 0}, "building the model failed"),
        ({"model": nn.Linear(3, 2).state_dict()}, "a function that builds one, got OrderedDict"),
        (
            {"test": zip([BATCH[0]], [BATCH[1]], strict=True)},
            "the test batches are an iterator",
        ),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"a tensor of one number, got shape \(4,\)"),
        ({"loss": lambda output, target: 0.5}, "a tensor of one number, got float"),
        ({"epochs": 1.5}, "epochs must be a whole number, 0 or more, not 1.5"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number above 0, not '1e-3'"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, not 0"),
    ],
)
def test_bad_tasks_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    task = linear_task(**changes)
    with pytest.raises(TaskError, match=message) as caught:
        check_task(task, task.build())
    assert "\n" not in str(caught.value)


def test_batches_that_cannot_be_read_are_one_sentence() -> None:
    def broken() -> Iterator[Any]:
        yield BATCH
        raise OSError("the disk went away")

    task = linear_task(train=broken)
    check_task(task, task.build())
    for read in (batch_count, lambda task: [*task.batches("train")]):
        with pytest.raises(
            TaskError, match="task 'custom': reading the train split failed: OSError: the disk went away"
        ):
            read(task)


def test_a_metric_that_is_not_a_number_is_refused() -> None:
    task = linear_task(metric=lambda output, target: float("nan"))
    with pytest.raises(TaskError, match="the metric on the val split is nan"):
        measure(task, task.build(), "val")


def test_own_tasks_are_found_in_the_current_folder(in_tmp: Path) -> None:
    (in_tmp / "found_here.py").write_text(
        "import torch\nfrom autocompress import Task\n"
        "b = [(torch.zeros(2, 3), torch.zeros(2).long())]\n"
        "def task():\n    return Task(torch.nn.Linear(3, 2), b, b, b)\n"
    )
    assert load_task("found_here:task").name == "found_here:task"
    with pytest.raises(TaskError, match=r"no function 'tusk'; did you mean 'task'"):
        load_task("found_here:tusk")
    with pytest.raises(TaskError, match=r"no function 'other'; choose one of: task$"):  # of what it defines
        load_task("found_here:other")


def test_own_tasks_are_found_by_their_file(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    place = in_tmp / "elsewhere"
    place.mkdir()
    for name in ("found_there.py", "json.py"):
        (place / name).write_text(
            "import torch\nfrom autocompress import Task\n"
            "b = [(torch.zeros(2, 3), torch.zeros(2).long())]\n"
            "def task():\n    return Task(torch.nn.Linear(3, 2), b, b, b)\n"
        )
    for name in ("elsewhere/found_there.py", f"{place}/found_there.py:task"):
        assert load_task(name).name == name
        assert create_run(None, name) == Path("runs") / (
            "found_there-0001" if ":" not in name else "found_there-task-0001"
        )
    with pytest.raises(TaskError, match="another module is called 'json': rename the file"):
        load_task("elsewhere/json.py")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("no_such_module:task", "there is no module 'no_such_module'"),
        ("no_such_file.py", "there is no file 'no_such_file.py'"),
        ("json:dumps", "calling it failed"),
        ("os:getcwd", "must return an autocompress.Task, got str"),
    ],
)
def test_unknown_tasks(name: str, message: str, in_tmp: Path) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(name)


def test_digits_is_what_its_documentation_says() -> None:
    task = load_task("digits")
    model = task.build()
    assert sum(p.numel() for p in model.parameters()) == 173_842
    counts = {split: sum(len(target) for _, target in task.batches(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 1077, "val": 8 * 360, "test": 360}
    one, two = next(task.batches("val")), next(load_task("digits").batches("val"))
    assert torch.equal(one[0], two[0])
    assert model(one[0]).shape == (360, 10)


def test_the_splits_of_digits_share_no_image() -> None:
    task = load_task("digits")
    (val, _), (test, _) = next(task.batches("val")), next(task.batches("test"))
    seen = {image.numpy().tobytes() for image in val}
    assert not any(image.numpy().tobytes() in seen for image in test)


def test_zoo_tasks_hold() -> None:
    for name in ("mlp", "two_inputs", "tied"):
        task = zoo_task(name)
        check_task(task, task.build())
