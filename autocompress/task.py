"""What the user brings: a trained model, batches, a loss and a metric."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autocompress.errors import AutocompressError, TaskError, in_words, near_misses
from autocompress.metric import Metric, SplitMetric, score
from autocompress.model.reparametrization import copied, plain
from autocompress.model.replacement import Replacement
from autocompress.model.surgery import tensors
from autocompress.nested import leaves, map_leaves
from autocompress.seeds import seeded

Batch = Any
"""`(inputs, target)`; inputs are a tensor, a tuple (`model(*inputs)`) or a dict (`model(**inputs)`), each as one where
`forward` takes only that."""
Batches = Iterable[Batch] | Callable[[], Iterable[Batch]]


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share of right classes; `output` float [N, C, ...], `target` int64 [N, ...]. Raises TaskError for others."""
    are_tensors = isinstance(output, Tensor) and isinstance(target, Tensor)
    classes = output.shape[1] if are_tensors and output.ndim > 1 else 0
    if classes < 2 or output.shape[:1] + output.shape[2:] != target.shape:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (output, target)]
        raise TaskError(
            "the metric `accuracy` takes outputs [N, C, ...] with a score for each of several classes and targets "
            f"[N, ...], got {shapes[0]} and {shapes[1]}: give metric="
        )
    return (output.argmax(1) == target).cpu().double().mean().item()


@dataclass
class Task:
    """A trained model and what is needed to fine-tune and to judge it.

    model: the trained `nn.Module`, or a function that builds it.
    train, val, test: iterables of batches, or functions that return one. The search selects on `val`;
        `test` is touched only to report.
    loss: `loss(output, target) -> scalar tensor`.
    metric: higher is better. `metric(output, target) -> float` is averaged over batches, weighted by batch size; a
        `WholeSplit` of it, or what has `reset`, `update` and `compute`, is of the whole split.
    forward: optional `forward(model, batch) -> (output, target)` for batches of any other form.
    pretrain: optional `pretrain(model)` that trains what `model` builds, in place. A search calls it
        once and keeps the weights in the run folder; `evaluate` never does.
    epochs, learning_rate: length and peak rate (AdamW, one cycle) of the fine-tuning of one trial; a search finds by
        itself which multiple of the rate suits heavy compression (docs/search.md). No epochs: layers are fitted to
        the outputs of the original's, in closed form (`trial/reconstruction.py`).
    """

    model: nn.Module | Callable[[], nn.Module]
    train: Batches
    val: Batches
    test: Batches
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy
    metric: Metric = accuracy
    forward: Callable[[nn.Module, Batch], tuple[Any, Any]] | None = None
    pretrain: Callable[[nn.Module], object] | None = None
    epochs: int = 5
    learning_rate: float = 2e-3
    name: str = "custom"
    _counted: tuple[object, int] | None = field(default=None, init=False, repr=False, compare=False)
    """What trains, and its batches, where only reading it tells how many there are."""

    def build(self) -> nn.Module:
        """A module of its own: built, or copied from the one that was given, in evaluation mode, its weights plain ones
        (docs/models.md)."""
        return plain(self.as_given())

    def as_given(self) -> nn.Module:
        """A module of its own, as `pretrain` trains it. Raises TaskError for what cannot be compressed."""
        if not callable(self.model):  # which modules are, too
            raise TaskError(
                f"task {self.name!r}: the model must be an nn.Module or a function that builds one, got "
                f"{type(self.model).__name__}"
            )
        try:
            model = copied(self.model) if isinstance(self.model, nn.Module) else self.model()
        except AutocompressError:
            raise
        except Exception as error:
            raise TaskError(f"task {self.name!r}: building the model failed: {in_words(error)}") from error
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {self.name!r}: the model function must return an nn.Module, got {type(model).__name__}"
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise TaskError(
                f"task {self.name!r}: the model is a ScriptModule, whose layers cannot be taken apart: give the "
                "nn.Module that it was made from"
            )
        unborn = [name for name, value in model.named_parameters() if is_lazy(value)]
        if unborn:
            raise TaskError(
                f"task {self.name!r}: parameter {unborn[0]!r} has no shape yet: run the model on a batch before you "
                "give it"
            )
        return model.eval()

    def batches(self, split: str) -> Iterator[Batch]:
        """The batches of "train", "val" or "test"; raises TaskError when there are none, or only once, or reading
        fails."""
        source = getattr(self, split)
        if isinstance(source, Iterator):
            raise TaskError(
                f"task {self.name!r}: the {split} batches are an iterator, which can be read only once; pass a list, a "
                "DataLoader or a function that returns a fresh iterable"
            )
        count = 0
        try:
            for batch in source() if callable(source) else source:
                count += 1
                yield batch
        except AutocompressError:
            raise
        except Exception as error:
            raise TaskError(f"task {self.name!r}: reading the {split} split failed: {in_words(error)}") from error
        if count == 0:
            raise TaskError(
                f"task {self.name!r}: the {split} loader gave no batches; pass a list, a DataLoader or a "
                "function that returns a fresh iterable"
            )

    def run(self, model: nn.Module, batch: Batch) -> tuple[Any, Any]:
        """Model output and target for one batch that is on the model's device already."""
        if self.forward is not None:
            return self.forward(model, batch)
        try:
            inputs, target = batch
        except (TypeError, ValueError):
            raise TaskError(
                f"task {self.name!r}: a batch must be (inputs, target), got {type(batch).__name__}; "
                "pass forward= for any other form"
            ) from None
        if isinstance(inputs, Mapping) and (_takes(model, (), inputs) or not _takes(model, (inputs,))):
            return model(**inputs), target
        if isinstance(inputs, (tuple, list)) and (_takes(model, inputs) or not _takes(model, (inputs,))):
            return model(*inputs), target
        return model(inputs), target


def _takes(model: nn.Module, args: Sequence[Any], named: Mapping[str, Any] | None = None) -> bool:
    """Whether `forward` has a place for each of these."""
    own = next(module for module in model.modules() if not isinstance(module, Replacement))
    try:
        inspect.signature(own.forward).bind(*args, **(named or {}))
    except TypeError:
        return False
    return True


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it, and whatever else knows how to, moved to `device`."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(value, move)


def batch_size(batch: Batch) -> int:
    """Length of the first tensor found in `batch`; 1 when there is none."""
    first = next((leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)), None)
    return 1 if first is None or not first.ndim else len(first)


def targets_of_each(batch: Batch) -> int:
    """Class indices that a sample of an (inputs, target) pair asks for; 1 for any other batch."""
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(target, Tensor) or target.is_floating_point() or not target.numel():
        return 1
    return max(1, target.numel() // batch_size(batch))


def batch_count(task: Task) -> int:
    """Batches of the train split, at least 1; read through once where it has no length."""
    source = task.train() if callable(task.train) else task.train
    try:
        return max(1, len(source))  # type: ignore[arg-type]
    except TypeError:
        if task._counted is None or task._counted[0] is not task.train:
            task._counted = task.train, sum(1 for _ in task.batches("train"))
        return max(1, task._counted[1])


def is_batched(leaf: Any, size: int) -> bool:
    """Whether it is a dense tensor with a row for each of `size` samples."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.ndim > 0 and len(leaf) == size


def first_samples(batch: Batch, count: int, skipped: int = 0) -> Batch:
    """`batch` with its first `count` samples after those that are skipped, as far as its tensors have a row for each
    sample."""
    size = batch_size(batch)
    return map_leaves(batch, lambda leaf: leaf[skipped : skipped + count] if is_batched(leaf, size) else leaf)


@dataclass(frozen=True)
class Calibration:
    """A few training batches on which models are tried, not trained."""

    task: Task
    batches: Sequence[Batch]

    def __call__(self, model: nn.Module) -> Any:
        """The model's output on the first batch."""
        return self.run(model)[0]

    def shortened(self, model: nn.Module) -> Calibration:
        """The first two samples of the first two batches, if `model` runs with so few: to look at its structure, not at
        what it says."""
        short = Calibration(self.task, [first_samples(batch, 2) for batch in self.batches[:2]])
        try:
            with torch.no_grad():
                short(model)
        except Exception:  # whatever a model does with so short a batch: it needs the whole
            return self
        return short

    def run(self, model: nn.Module) -> tuple[Any, Any]:
        """The model's output on the first batch, and the target."""
        return self.task.run(model, self.batches[0])

    def loss(self, model: nn.Module) -> Tensor:
        """The task's loss on the first batch, a scalar with a gradient."""
        return self.task.loss(*self.run(model))


@torch.no_grad()
def measure(task: Task, model: nn.Module, split: str) -> float:
    """Metric of `model` on a split, to ten decimals: as many right answers in other batches are as good.

    Raises TaskError when the split is empty, the metric fails, or what it gives is not one finite number.
    """
    was_training = model.training
    model.eval()
    device = device_of(model)

    def judged() -> Iterator[tuple[Any, Any, int]]:
        for batch in task.batches(split):
            yield *task.run(model, to_device(batch, device)), batch_size(batch)

    try:
        with seeded(0):  # what draws random numbers draws the same for every model
            value = score(to_device(task.metric, device), judged())
    except AutocompressError:
        raise
    except Exception as error:
        raise TaskError(f"task {task.name!r}: measuring on the {split} split failed: {in_words(error)}") from error
    if not math.isfinite(value):
        raise TaskError(f"task {task.name!r}: the metric on the {split} split is {value}")
    model.train(was_training)
    return round(value, 10)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def fastest_device() -> str:
    """Of this process: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_task(task: Task, model: nn.Module) -> None:
    """One loss and one metric on one batch of each split, and one loss in training, or a TaskError; and one for a model
    that has nothing to compress."""
    _check_settings(task, model)
    trained = copied(model).train(task.epochs > 0)
    for split, how, tried in [(s, "", model) for s in ("train", "val", "test")] + [("train", " in training", trained)]:
        try:
            batch = to_device(next(task.batches(split)), device_of(model))
            with torch.no_grad():
                output, target = task.run(tried, batch)
                loss = task.loss(output, target)
                if tried is model and not isinstance(task.metric, SplitMetric):  # which may need more than one batch
                    score(task.metric, [(output, target, 1)])
        except AutocompressError:
            raise
        except Exception as error:
            raise TaskError(
                f"task {task.name!r}: a batch of the {split} split does not run{how}: {in_words(error)}"
            ) from error
        _check_loss(task, loss, f"on the {split} split{how}")


def _check_settings(task: Task, model: nn.Module) -> None:
    if not any(value.is_floating_point() or value.is_complex() for value in model.parameters()):
        raise TaskError(
            f"task {task.name!r}: the model has no parameters of floats, so nothing to compress: give it as it was "
            "trained, not quantised"
        )
    held = {tensor.data_ptr() for tensor in tensors(model).values()}
    for key, value in model.state_dict().items():
        for leaf in leaves(value):
            if isinstance(leaf, torch.ScriptObject) or (
                isinstance(leaf, Tensor) and leaf.numel() > 1 and leaf.data_ptr() not in held
            ):
                raise TaskError(
                    f"task {task.name!r}: {key!r} of the model's state_dict is no parameter and no buffer, and would "
                    "be in no file: give the model as it was trained, not quantised"
                )
    if not (isinstance(task.epochs, int) and task.epochs >= 0):
        raise TaskError(f"task {task.name!r}: epochs must be a whole number, 0 or more, not {task.epochs!r}")
    if not (isinstance(task.learning_rate, Real) and 0 < task.learning_rate < math.inf):
        raise TaskError(f"task {task.name!r}: learning_rate must be a number above 0, not {task.learning_rate!r}")


def _check_loss(task: Task, loss: Any, where: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(f"task {task.name!r}: the loss must be a tensor of one number, got {given}")
    if not bool(torch.isfinite(loss)):
        raise TaskError(
            f"task {task.name!r}: the loss {where} is {float(loss):g}; it must be finite: check the inputs and the "
            "model's weights"
        )


def load_task(name: str) -> Task:
    """A built-in task by name, `package.module:function` found from the current folder and PYTHONPATH, or
    `file.py:function`, where the function is `task` if none is named.

    Raises TaskError, naming the near misses, when nothing of that name can be imported.
    """
    function = _function_named(name)
    try:
        task = function()
    except AutocompressError:
        raise
    except Exception as error:
        raise TaskError(f"task {name!r}: calling it failed: {in_words(error)}") from error
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} must return an autocompress.Task, got {type(task).__name__}")
    task.name = name
    return task


def _function_named(name: str) -> Callable[[], Any]:
    """That makes the task of this name."""
    from autocompress.tasks import BUILT_IN

    module_name, _, function_name = BUILT_IN.get(name, name).partition(":")
    file = Path(module_name).resolve() if module_name.endswith(".py") else None
    if file is not None:
        if not file.is_file():
            raise TaskError(f"task {name!r}: there is no file {module_name!r}")
        module_name, function_name = file.stem, function_name or "task"
    if not function_name:
        raise TaskError(
            f"unknown task {name!r}{near_misses(name, BUILT_IN)} (or name your own as package.module:function or "
            "file.py:function)"
        )
    folder = str(file.parent if file else Path.cwd())
    if name not in BUILT_IN and folder not in sys.path:
        sys.path.insert(0, folder)
    module = _imported(module_name, name)
    if file is not None and file != Path(getattr(module, "__file__", None) or "").resolve():
        raise TaskError(f"task {name!r}: another module is called {module_name!r}: rename the file")
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        defined = [k for k, v in inspect.getmembers(module, inspect.isfunction) if v.__module__ == module.__name__]
        functions = [other for other in defined if not other.startswith("_")]
        raise TaskError(
            f"task {name!r}: {module_name!r} has no function {function_name!r}{near_misses(function_name, functions)}"
        )
    made: Callable[[], Any] = function
    return made


def _imported(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise TaskError(f"task {name!r} needs the package {error.name!r}: install it") from error
        raise TaskError(
            f"task {name!r}: there is no module {module_name!r} in the current folder or on PYTHONPATH"
        ) from error
    except Exception as error:
        raise TaskError(f"task {name!r}: importing {module_name!r} failed: {in_words(error)}") from error
