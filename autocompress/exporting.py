"""A decoded model for other programs: an exported program of PyTorch, or ONNX.

Both hold the graph and float32 weights. They need neither this package nor the model's class, and are much larger
than the artifact, which stays what is kept and shipped.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from autocompress.artifact import read_artifact, unpack
from autocompress.errors import AutocompressError, ExportError, in_words
from autocompress.files import write_file
from autocompress.task import Task, batch_size, is_batched, load_task, measure


@dataclass(frozen=True)
class Exported:
    """path: what was written. size_bytes: of that file on disk. Accuracies: the task's metric of that file, run by
    PyTorch or by ONNX Runtime."""

    path: Path
    size_bytes: int
    val_accuracy: float
    test_accuracy: float


def export(path: str | Path, task: Task | str, output: str | Path) -> Exported:
    """Write the model of a `.acz` file to `output`, and measure what was written on both held-out splits.

    output: its ending is the format, `.pt2` (`torch.export`) or `.onnx` (with the packages of `autocompress[onnx]`).
    What is written takes batches of any length that the model takes.

    Raises ArtifactError when the file cannot be read or does not fit the task's model, ExportError for another ending,
    for packages that are missing, and for a model that cannot be exported.
    """
    output = Path(output)
    kind = FORMATS.get(output.suffix)
    if kind is None:
        raise ExportError(f"cannot export to {str(output)!r}: give a name that ends with {' or '.join(FORMATS)}")
    artifact = read_artifact(path)
    missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{kind.name} needs the packages {', '.join(missing)}: pip install {' '.join(missing)}")
    given = load_task(task) if isinstance(task, str) else task
    model = unpack(artifact, given.build())
    try:
        program = _program(given, model)
        write_file(output, kind.encode(program))
        written = kind(output, program)
        return Exported(output, output.stat().st_size, measure(given, written, "val"), measure(given, written, "test"))
    except (AutocompressError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"the model of {str(path)!r} cannot be exported to {output.suffix}: {in_words(error)}"
        ) from error


def _program(task: Task, model: nn.Module) -> ExportedProgram:
    """The model as the first batch of the validation split calls it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    batch = next(task.batches("val"))
    handle = model.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        task.run(model, batch)
    handle.remove()
    if not calls:
        raise ExportError(
            f"task {task.name!r} does not call its model as model(...), which is what is exported: let forward= do so"
        )
    args, kwargs = calls[0]

    def any_length(value: Any) -> dict[int, Any] | None:
        return {0: torch.export.Dim.AUTO} if is_batched(value, batch_size(batch)) else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = (*tree_map(any_length, args), *tree_map(any_length, kwargs).values())
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


class _Written(nn.Module):
    """A file as the task calls models. program: which it was made of."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    """That must be there."""

    def __init__(self, path: Path, program: ExportedProgram) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def encode(program: ExportedProgram) -> bytes:
        """What the file holds."""


class _Pt2(_Written):
    name = "an exported program"

    def __init__(self, path: Path, program: ExportedProgram) -> None:
        super().__init__(path, program)
        self._run = (torch.export.load(path).module(),)  # in a tuple: such a module cannot be told to evaluate

    @staticmethod
    def encode(program: ExportedProgram) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file)
        return file.getvalue()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run[0](*args, **kwargs)


class _Onnx(_Written):
    name = "ONNX"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def __init__(self, path: Path, program: ExportedProgram) -> None:
        super().__init__(path, program)
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._output = program.call_spec.out_spec

    @staticmethod
    def encode(program: ExportedProgram) -> bytes:
        import onnx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of a torchvision that is not needed
            for optimize in (True, False):  # which does not always leave a graph in order
                made = torch.onnx.export(program, dynamo=True, verbose=False, optimize=optimize)
                assert made is not None
                file = bytes(made.model_proto.SerializeToString())
                with suppress(onnx.checker.ValidationError):
                    onnx.checker.check_model(file)
                    break
        return file

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = [entry.name for entry in self._session.get_inputs()]
        values = [leaf.numpy() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = self._session.run(None, dict(zip(names, values, strict=True)))
        assert self._output is not None
        return tree_unflatten([torch.from_numpy(output) for output in outputs], self._output)


FORMATS: dict[str, type[_Written]] = {".pt2": _Pt2, ".onnx": _Onnx}
"""Ending of a file -> its format."""
