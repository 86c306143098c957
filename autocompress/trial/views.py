"""Inputs and outputs of modules, of a candidate and of the original, on training batches."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.model.hooks import Watch, forward_hooks
from autocompress.nested import cloned, leaves
from autocompress.seeds import seeded
from autocompress.task import Batch, Calibration, Task, batch_size, device_of, first_samples, to_device
from autocompress.trial.handed import taken
from autocompress.trial.matrix import MOST_ROWS, Call
from autocompress.trial.replay import Replay

_FEWEST, _SAMPLES = 64, 4096
"""Training samples that a module is watched on, at least and at most; as many as give `MOST_ROWS` rows."""
_CHANNELS_FIRST = nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd


class _RanError(Exception):
    """A module has run: the rest of the model need not."""


class Samples:
    """The first training batches, always the same, and the original, which runs with them: for all trials of a worker.
    Batches are read once, and no more of them than are asked for. replays: `can_replay` of the original."""

    def __init__(self, task: Task, original: nn.Module, replays: bool) -> None:
        self.task, self.original = task, original
        self._more, self._batches, self._count = task.batches("train"), list[Batch](), 0
        self._short = Calibration(task, [next(self.read())]).shortened(original)
        self.fewest = batch_size(self._short.batches[0])
        """That the original runs with."""
        self._replays = replays
        self.replay = self.replay_of(original)

    def replay_of(self, model: nn.Module) -> Replay:
        """Of the original, or of a candidate."""
        return Replay(model, partial(self._short, model) if self._replays else lambda: None)

    def read(self) -> Iterator[Batch]:
        at = 0
        while True:
            if at == len(self._batches):
                if self._count >= _SAMPLES:
                    return
                with seeded(1 + at):
                    batch = next(self._more, None)
                if batch is None:
                    return
                self._batches.append(to_device(batch, device_of(self.original)))
                self._count += batch_size(batch)
            yield self._batches[at]
            at += 1

    def small_batches(self, count: int, samples: int) -> Iterator[Batch]:
        """So many, of so many samples each if the model runs with so few."""
        size = max(self.fewest, samples)
        every = (
            first_samples(batch, size, start)
            for batch in self.read()
            for start in range(0, max(1, batch_size(batch) - size + 1), size)
        )
        return itertools.islice(every, count)


class Views:
    """Inputs and outputs of modules, of a candidate and of the original."""

    def __init__(self, samples: Samples, model: nn.Module) -> None:
        self.samples, self.model = samples, model
        others = dict(samples.original.named_modules())
        self._alike = {m: others[name] for name, m in model.named_modules() if type(others.get(name)) is type(m)}
        """Module of the candidate -> the original's of the same name and kind."""
        self._runs, self._values = Counter[nn.Module](), Counter[nn.Module]()
        """Of the module, and of a channel of all its outputs, from one sample."""
        self._replays = {model: samples.replay_of(model), samples.original: samples.replay}

    def in_order(self) -> dict[nn.Module | nn.Parameter, None]:
        """The modules that run, as they first end, among the weights that linear operations are given, as they first
        are."""
        batch, order = next(self.samples.read()), dict[nn.Module | nn.Parameter, None]()
        self._runs, self._values = Counter(), Counter()

        def count(module: Any, args: Any, output: Any) -> None:
            order.setdefault(module)
            self._runs[module] += 1
            y = _first(output)
            channels = y.shape[1] if isinstance(module, _CHANNELS_FIRST) else y.shape[-1]
            self._values[module] += y.numel() / max(channels, 1) / batch_size(batch)

        def note(func: Any, args: Any, kwargs: Any, output: Any) -> None:
            order.update(dict.fromkeys(taken(func, args, kwargs)))

        with forward_hooks((module, count) for module in self.model.modules()), Watch(note):
            self.samples.task.run(self.model, batch)
        return order

    def of(self, module: nn.Module, rows: int = MOST_ROWS, alone: bool = False) -> Iterator[tuple[Call, Call | None]]:
        """Run by run, of the module in the candidate and in the original; None where that has none like it, or one of
        other channels, and if the candidate is to be seen alone. rows: of its output, as far as there are so many."""
        other = None if alone else self._alike.get(module)
        left = max(_FEWEST, math.ceil(rows / max(self._values[module], 1e-6)))
        for at, batch in enumerate(self.samples.read()):
            if left <= 0:
                return
            batch = first_samples(batch, max(self.samples.fewest, left))
            left -= batch_size(batch)
            runs = self._runs[module]
            seen = self._see(self.model, module, runs, batch, at)
            likes = self._see(self.samples.original, other, runs, batch, at) if other is not None else []
            for call, like in itertools.zip_longest(seen, likes[: len(seen)]):
                same = like is not None and _first(like.output).shape == _first(call.output).shape
                yield call, like if same else None

    def _see(self, model: nn.Module, module: nn.Module, runs: int, batch: Batch, at: int) -> list[Call]:
        found: list[Call] = []

        def see(*call: Any) -> None:
            found.append(Call(*call))
            if len(found) == runs:
                raise _RanError
            found[-1] = cloned(found[-1])

        replayed = self._replays[model].since([module], (at, batch_size(batch)))
        with suppress(_RanError), seeded(at), forward_hooks([(module, see)], with_kwargs=True), replayed:
            self.samples.task.run(model, batch)
        return found


def _first(output: Any) -> Any:
    """Its first tensor that is no single number; a row of none if there is no such."""
    found = (leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.ndim)
    return next(found, torch.empty(1, 1))
