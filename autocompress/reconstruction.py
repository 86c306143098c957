"""Post-training compression: what fine-tuning would make good for, layer by layer and in closed form.

Layers are taken in the order in which they run, each with the inputs that the layers before it give by now. Its
weights are moved to where it says what the original's said (least squares, He et al., ICCV 2017), so each layer makes
good for the errors of those before. Those go that are smallest times the norm of their input (Wanda, Sun et al., ICLR
2024), and what stays of each output is fitted once more (conjugate gradients, Hestenes and Stiefel, 1952) and rounded.
Biases make good for what is left of the mean (Nagel et al., ICCV 2019), and batch norms see to it that each channel has
the mean and the variance that it had (EagleEye, Li et al., ECCV 2020, takes new statistics).

Not for layers that run more than once, share their weight, have more than 8,192 inputs, or are no matrix
(`matrices.py`): their weights are pruned by magnitude and rounded to the nearest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autocompress.compression import Candidate, ShadowedLayer, drawn_mask
from autocompress.hooks import forward_hooks
from autocompress.matrices import MOST_ROWS, Call, Matrix, by_place, input_of, matrices
from autocompress.nested import leaves
from autocompress.recipe import Choice
from autocompress.replay import Replay
from autocompress.surgery import owners
from autocompress.task import Batch, Calibration, Task, batch_size, device_of, first_samples, to_device

_DAMPING = 0.01
"""Share of the mean of a Hessian's diagonal that is added to it, at least."""
_ROUND_OFF = 1e-20
"""Of a Hessian, as a share of its trace before the means were taken out."""
_WIDEST = 8192
"""Inputs of the widest layer that is fitted: its Hessian has their square."""
_ROUNDS = 20
"""Of conjugate gradients."""
_FEWEST, _SAMPLES = 64, 4096
"""Training samples that a layer is fitted to, at least and at most; as many as give `MOST_ROWS` rows."""
_RATIO = 1e-4, 1e4
"""By which a variance may change."""

Norm = nn.modules.batchnorm._BatchNorm


class _Part(NamedTuple):
    """A layer or a batch norm, by the module whose runs tell of it. matrix: None for a norm."""

    module: nn.Module
    matrix: Matrix | None


class _Fit(NamedTuple):
    """What a layer of g groups, each of n inputs and m outputs, is fitted to, float64. hessian: [g, n, n], sum over
    `rows` rows, [g], of the products of inputs. pull: [g, n, m], that of the inputs and what the outputs lack. input,
    lack: [g, n] and [g, m], their means, which are taken out of both where the layer has a bias."""

    rows: Tensor
    hessian: Tensor
    pull: Tensor
    input: Tensor
    lack: Tensor


@torch.no_grad()
def reconstruct(task: Task, candidate: Candidate, original: nn.Module, replays: bool) -> None:
    """Prune and round the weights of `candidate`, in place, so that its layers say what those of `original` say.

    replays: `can_replay` of the original.
    """
    views, targets = _Views(task, candidate.model, original, replays), candidate.targets()
    candidate.materialise()
    for name, part in views.in_order(_parts(candidate)):
        match part:
            case Norm() as norm, None:
                _recalibrate(norm, views.of(norm))
            case module, Matrix() as matrix:
                shadow = candidate.layers[name]
                shadow.parameter.copy_(shadow.dense)
                bias = matrix.bias(module)
                fit = _fit(matrix, views.of(module), bias is not None)
                if fit is not None:
                    _compress(candidate, shadow, matrix, bias, fit, targets[name])
                shadow.parameter.copy_(shadow.effective())


def _parts(candidate: Candidate) -> dict[str, _Part]:
    """Name -> layer that can be fitted, or batch norm."""
    places, known, out = owners(candidate.model), matrices(candidate.model), dict[str, _Part]()
    for name, shadow in candidate.layers.items():
        place, *others = places[shadow.key]
        if not others and place in known and known[place][1].grouped(shadow.dense, 1).shape[-1] <= _WIDEST:
            out[name] = _Part(*known[place])
    for name, module in candidate.model.named_modules():
        if isinstance(module, Norm) and module.running_var is not None:
            out[name] = _Part(module, None)
    return out


class _RanError(Exception):
    """A module has run: the rest of the model need not."""


class _Views:
    """What modules of a candidate and of the original see and say on the first training batches, which are read once;
    and no more of them is read, or run, than is asked for."""

    def __init__(self, task: Task, model: nn.Module, original: nn.Module, replays: bool) -> None:
        self.task, self.model, self.original = task, model, original
        others = dict(original.named_modules())
        self._alike = {m: others[name] for name, m in model.named_modules() if type(others.get(name)) is type(m)}
        """Module of the candidate -> the original's of the same name and kind."""
        self._more, self._batches, self._samples = task.batches("train"), list[Batch](), 0
        self._values: dict[nn.Module, float] = {}
        """Of a channel of the module's output, from one sample."""
        short = Calibration(task, [next(self._read())]).shortened(model)
        self._fewest = batch_size(short.batches[0])
        self._replays = {m: Replay(m, partial(short, m) if replays else lambda: None) for m in (model, original)}

    def in_order(self, parts: Mapping[str, _Part]) -> list[tuple[str, _Part]]:
        """Those that run once, as they run."""
        runs, batch = Counter[nn.Module](), next(self._read())

        def count(module: Any, args: Any, output: Any) -> None:
            y = next(leaves(output))
            channels = y.shape[1] if isinstance(module, Norm | nn.modules.conv._ConvNd) else y.shape[-1]
            runs[module] += 1
            self._values[module] = y.numel() / channels / batch_size(batch)

        with forward_hooks({part.module: count for part in parts.values()}.items()):
            self.task.run(self.model, batch)
        once = [module for module, times in runs.items() if times == 1]
        return [(name, part) for module in once for name, part in parts.items() if part.module is module]

    def of(self, module: nn.Module) -> Iterator[tuple[Call, Call | None]]:
        """Batch by batch, of the module in the candidate, where it runs, and in the original; None where that has none
        like it, or one of other channels."""
        other, left = self._alike.get(module), max(_FEWEST, math.ceil(MOST_ROWS / max(self._values[module], 1e-6)))
        for at, batch in enumerate(self._read()):
            if left <= 0:
                return
            batch = first_samples(batch, max(self._fewest, left))
            left -= batch_size(batch)
            seen = self._see(self.model, module, batch, at)
            like = self._see(self.original, other, batch, at) if other is not None else None
            if seen is not None:
                same = like is not None and next(leaves(like.output)).shape == next(leaves(seen.output)).shape
                yield seen, like if same else None

    def _see(self, model: nn.Module, module: nn.Module, batch: Batch, at: int) -> Call | None:
        found: list[Call] = []

        def see(*call: Any) -> None:
            found.append(Call(*call))
            raise _RanError

        replayed = self._replays[model].since([module], (at, batch_size(batch)))
        with suppress(_RanError), forward_hooks([(module, see)], with_kwargs=True), replayed:
            self.task.run(model, batch)
        return found[0] if found else None

    def _read(self) -> Iterator[Batch]:
        at = 0
        while True:
            if at == len(self._batches):
                batch = next(self._more, None) if self._samples < _SAMPLES else None
                if batch is None:
                    return
                self._batches.append(to_device(batch, device_of(self.model)))
                self._samples += batch_size(batch)
            yield self._batches[at]
            at += 1


def _fit(matrix: Matrix, views: Iterator[tuple[Call, Call | None]], centred: bool) -> _Fit | None:
    """None if the layer does not run any more, or is given nothing. centred: the means are taken out."""
    sums: list[list[Tensor]] = []
    origins: list[tuple[Tensor, Tensor]] = []
    for seen, like in views:
        said = matrix.says(seen)
        wanted = said if like is None else matrix.says(like)
        rows = [(x.double(), (z - y).double()) for x, y, z in zip(matrix.rows(seen), said, wanted, strict=True)]
        if not sums:
            sums = [_sums(a[:, :0], d[:, :0]) for a, d in rows]
            # counted from near their mean: what is left when that is taken out is not round-off
            origins = [(_origin(a, centred), _origin(d, centred)) for a, d in rows]
        for part, (a, d), (x, y) in zip(sums, rows, origins, strict=True):
            for known, more in zip(part, _sums(a - x, d - y), strict=True):
                known += more
    if not sums:
        return None
    count, hessian, pull, total, lacking = map(torch.cat, zip(*sums, strict=True))
    if not count.all():
        return None
    input, lack = total / count[:, None], lacking / count[:, None]
    if centred:
        hessian -= total[:, :, None] * input[:, None]
        pull -= total[:, :, None] * lack[:, None]
    x, y = (torch.cat(each)[:, 0] for each in zip(*origins, strict=True))
    return _Fit(count, hessian, pull, input + x, lack + y)


def _sums(a: Tensor, d: Tensor) -> list[Tensor]:
    """Of each group: rows, products of inputs, of inputs and what lacks, sums of both."""
    return [a.new_full((len(a),), a.shape[1]), a.mT @ a, a.mT @ d, a.sum(1), d.sum(1)]


def _origin(values: Tensor, centred: bool) -> Tensor:
    """[groups, 1, n]."""
    mean = values.mean(1, keepdim=True)
    return mean if centred and values.shape[1] else torch.zeros_like(mean)


def _compress(
    candidate: Candidate,
    shadow: ShadowedLayer,
    matrix: Matrix,
    bias: Tensor | None,
    fit: _Fit,
    targets: Mapping[str, Choice],
) -> None:
    """The weights, the mask and the steps that make what the file will hold, and the bias that goes with them."""
    groups, shape = len(fit.rows), shadow.dense.shape
    before = matrix.grouped(shadow.dense, groups).double()
    diagonal = _diagonal(fit.hessian) + _damping(fit)[:, None]
    hessian = fit.hessian.diagonal_scatter(diagonal, dim1=1, dim2=2)
    weight = before + torch.cholesky_solve(fit.pull, torch.linalg.cholesky(hessian)).mT
    mask = drawn_mask(matrix.restored(weight * diagonal.sqrt()[:, None], shape).float(), targets)
    if mask is not None:
        shadow.mask, weight = mask.float(), _refitted(weight, hessian, matrix.grouped(mask, groups))
    shadow.dense = matrix.restored(weight, shape).float()
    candidate.fit_steps(shadow)
    if bias is not None:
        moved = matrix.grouped(shadow.effective(), groups).double() - before
        bias += (fit.lack - (moved @ fit.input[:, :, None])[:, :, 0]).flatten().to(bias.dtype)


def _refitted(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The nearest to `weight`, in the norm of `hessian`, of the matrices that are zero where `kept` is not: all outputs
    at once, by conjugate gradients scaled by the diagonal. float64 [groups, outputs, inputs], [groups, inputs, inputs];
    bool."""
    nearest, scale = weight * kept, _diagonal(hessian)[:, None]
    left = (weight - nearest) @ hessian * kept
    direction = scaled = left / scale
    energy = (left * scaled).sum(-1, keepdim=True)
    for _ in range(_ROUNDS):
        turned = direction @ hessian * kept
        step = energy / (direction * turned).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        nearest = nearest + step * direction
        left = left - step * turned
        scaled, last = left / scale, energy.clamp_min(torch.finfo(torch.float64).tiny)
        energy = (left * scaled).sum(-1, keepdim=True)
        direction = scaled + energy / last * direction
    return nearest


def _diagonal(hessian: Tensor) -> Tensor:
    """[groups, inputs]."""
    return hessian.diagonal(dim1=1, dim2=2)


def _damping(fit: _Fit) -> Tensor:
    """What is added to the diagonal of the Hessians: the fewer rows they were seen in, the more (oracle approximating
    shrinkage, Chen et al., 2010), and more than what is left of inputs that never change. float64 [groups]."""
    n, trace, squares = fit.hessian.shape[1], _diagonal(fit.hessian).sum(1), fit.hessian.square().sum((1, 2))
    spread = ((squares - trace.square() / n) * (fit.rows + 1 - 2 / n)).clamp_min(torch.finfo(torch.float64).tiny)
    share = (((1 - 2 / n) * squares + trace.square()) / spread).clamp(0, 0.99)
    noise = _ROUND_OFF * (trace + fit.rows * fit.input.square().sum(1)) + torch.finfo(torch.float32).tiny
    return torch.clamp(share / (1 - share), min=_DAMPING) * trace / n + noise


def _recalibrate(norm: Norm, views: Iterator[tuple[Call, Call | None]]) -> None:
    """Statistics by which the channels have the mean and the variance that they have in the original; those of the
    channels where it has others."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own, others, known = list[Tensor](), list[Tensor](), True
    for seen, like in views:
        own.append(_channels(seen))
        known = known and like is not None
        others.append(_channels(like) if like is not None else own[-1])
    if not own:
        return
    (variance, mean), (was, middle) = (torch.var_mean(torch.cat(part, 1), 1) for part in (own, others))
    if not known:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        return
    ratio = torch.where(was > 0, variance / was, 1.0).clamp(*_RATIO)
    norm.running_mean.sub_(middle).mul_(ratio.sqrt()).add_(mean)
    norm.running_var.add_(norm.eps).mul_(ratio).sub_(norm.eps).clamp_min_(0)


def _channels(call: Call) -> Tensor:
    """float64 [channels, values]: what went in."""
    x = input_of(*call.args, **call.kwargs)
    return by_place(x, x.ndim - 2).T.double()
