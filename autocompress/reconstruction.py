"""Post-training compression: what fine-tuning would make good for, layer by layer and in closed form.

Layers are taken in the order in which they run, each with the inputs that the layers before it give by now. Its
weights are moved to where it says what the original's said (least squares, He et al., ICCV 2017), so each layer makes
good for the errors of those before. Those go that are smallest times the norm of their input (Wanda, Sun et al., ICLR
2024), and what stays of each output is fitted once more (conjugate gradients, Hestenes and Stiefel, 1952) and rounded.
Biases make good for what is left of the mean (Nagel et al., ICCV 2019), and batch norms see to it that each channel has
the mean and the variance that it had (EagleEye, Li et al., ECCV 2020, takes new statistics).

Not for layers that run more than once, share their weight, have more than 8,192 inputs, or are neither linear nor
convolutions of one group: their weights are pruned by magnitude and rounded to the nearest.
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
from torch.nn.functional import pad, unfold

from autocompress.compression import Candidate, ShadowedLayer, drawn_mask
from autocompress.hooks import forward_hooks
from autocompress.recipe import Choice
from autocompress.replay import Replay
from autocompress.surgery import owners
from autocompress.task import Batch, Calibration, Task, batch_size, device_of, first_samples, to_device

_DAMPING = 0.01
"""Share of the mean of a Hessian's diagonal that is added to it, at least."""
_WIDEST = 8192
"""Inputs of the widest layer that is fitted: its Hessian has their square."""
_ROWS, _MOST_ROWS = 16, 16_384
"""What a layer is fitted to: times its inputs, and at most."""
_ROUNDS = 20
"""Of conjugate gradients."""
_SAMPLES, _PLACES = 4096, 4096
"""Training samples at most; and values of a channel that its mean and variance are taken of."""
_RATIO = 1e-4, 1e4
"""By which a variance may change."""

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Norm = nn.modules.batchnorm._BatchNorm


class _Seen(NamedTuple):
    """What went into a module and what came out."""

    input: Tensor
    output: Tensor


class _Fit(NamedTuple):
    """What a layer of n inputs and m outputs is fitted to, float64. hessian: [n, n], sum over `rows` rows of the
    products of inputs. pull: [n, m], that of the inputs and what the outputs lack. input, lack: [n] and [m], their
    means, which are taken out of both where the layer has a bias."""

    rows: int
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
    for name, module in views.in_order(_modules(candidate)):
        if isinstance(module, Norm):
            _recalibrate(module, views.of(name, _PLACES))
        else:
            shadow = candidate.layers[name]
            shadow.parameter.copy_(shadow.dense)
            fit = _fit(module, views.of(name, min(_ROWS * shadow.dense[0].numel(), _MOST_ROWS)))
            if fit is not None:
                _compress(candidate, shadow, module, fit, targets[name])
            shadow.parameter.copy_(shadow.effective())


def _modules(candidate: Candidate) -> dict[str, Layer | Norm]:
    """Name -> layer that can be fitted, or batch norm."""
    places, out = owners(candidate.model), dict[str, Layer | Norm]()
    for name, shadow in candidate.layers.items():
        module, attribute = places[shadow.key][0]
        own = len(places[shadow.key]) == 1 and attribute == "weight"
        if own and isinstance(module, Layer) and _groups(module) == 1 and shadow.dense[0].numel() <= _WIDEST:
            out[name] = module
    for name, module in candidate.model.named_modules():
        if isinstance(module, Norm) and module.running_var is not None:
            out[name] = module
    return out


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


class _RanError(Exception):
    """A module has run: the rest of the model need not."""


class _Views:
    """What modules of a candidate and of the original see and say on the first training batches, which are read once;
    and no more of them is read, or run, than is asked for."""

    def __init__(self, task: Task, model: nn.Module, original: nn.Module, replays: bool) -> None:
        self.task, self.model, self.original = task, model, original
        self._known = dict(original.named_modules())
        self._more, self._batches, self._samples = task.batches("train"), list[Batch](), 0
        self._values: dict[str, float] = {}
        """Of a channel of the module's output, from one sample."""
        short = Calibration(task, [next(self._read())]).shortened(model)
        self._fewest = batch_size(short.batches[0])
        self._replays = {m: Replay(m, partial(short, m) if replays else lambda: None) for m in (model, original)}

    def in_order(self, modules: Mapping[str, Layer | Norm]) -> list[tuple[str, Layer | Norm]]:
        """Those that run once, on inputs in batches, as they run."""
        names, runs = {id(module): name for name, module in modules.items()}, Counter[str]()
        batch = next(self._read())

        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            name = names[id(module)]
            match modules[name]:
                case Norm(num_features=channels):
                    least = 2
                case layer:
                    channels, least = len(layer.weight), layer.weight.ndim
            runs[name] += 1 if args and args[0].ndim >= least else 2
            self._values[name] = output.numel() / channels / batch_size(batch)

        with forward_hooks((module, count) for module in modules.values()):
            self.task.run(self.model, batch)
        return [(name, modules[name]) for name, times in runs.items() if times == 1]

    def of(self, name: str, values: int) -> Iterator[tuple[_Seen, _Seen | None]]:
        """Batch by batch, of the module in the candidate, where it runs, and in the original; None where that has none,
        or one of other channels. values: of each channel, at least, if there are as many."""
        module, other = self.model.get_submodule(name), self._known.get(name)
        for at, batch in enumerate(self._read()):
            if values <= 0:
                return
            batch = first_samples(batch, max(self._fewest, math.ceil(values / max(self._values[name], 1e-6))))
            values -= math.floor(batch_size(batch) * self._values[name])
            seen = self._see(self.model, module, batch, at)
            like = self._see(self.original, other, batch, at) if other is not None else None
            if seen is not None and len(seen.input):
                yield seen, like if like is not None and like.output.shape == seen.output.shape else None

    def _see(self, model: nn.Module, module: nn.Module, batch: Batch, at: int) -> _Seen | None:
        found: list[_Seen] = []

        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.append(_Seen(args[0], output))
            raise _RanError

        replayed = self._replays[model].since([module], (at, batch_size(batch)))
        with suppress(_RanError), forward_hooks([(module, see)]), replayed:
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


def _fit(layer: Layer, views: Iterator[tuple[_Seen, _Seen | None]]) -> _Fit | None:
    """None if the layer does not run any more."""
    outputs, inputs = len(layer.weight), layer.weight[0].numel()
    hessian, pull = (layer.weight.new_zeros(inputs, n, dtype=torch.float64) for n in (inputs, outputs))
    total, lacking, rows = hessian.new_zeros(inputs), hessian.new_zeros(outputs), 0
    for (x, y), like in views:
        lack = torch.zeros_like(y) if like is None else like.output - y
        a, d = _rows(layer, x).double(), _places(layer, lack).double()
        hessian += a.T @ a
        pull += a.T @ d
        total += a.sum(0)
        lacking += d.sum(0)
        rows += len(a)
    if not rows:
        return None
    if layer.bias is not None:
        hessian -= torch.outer(total, total) / rows
        pull -= torch.outer(total, lacking) / rows
    return _Fit(rows, hessian, pull, total / rows, lacking / rows)


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """[rows, inputs]: what the matrix of the layer is multiplied by."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = pad(x, layer._reversed_padding_repeated_twice, mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):  # as of images that are one pixel high
        x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    return unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def _places(layer: Layer, y: Tensor) -> Tensor:
    """[rows, outputs]."""
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2).flatten(0, 1)


def _compress(
    candidate: Candidate, shadow: ShadowedLayer, layer: Layer, fit: _Fit, targets: Mapping[str, Choice]
) -> None:
    """The weights, the mask and the steps that make what the file will hold, and the bias that goes with them."""
    before, shape = shadow.dense.flatten(1).double(), shadow.dense.shape
    hessian = fit.hessian.diagonal_scatter(fit.hessian.diagonal() + _damping(fit))
    weight = before + torch.cholesky_solve(fit.pull, torch.linalg.cholesky(hessian)).T
    mask = drawn_mask((weight * hessian.diagonal().sqrt()).float().view(shape), targets)
    if mask is not None:
        shadow.mask, weight = mask.float(), _refitted(weight, hessian, mask.flatten(1))
    shadow.dense = weight.float().view(shape)
    candidate.fit_steps(shadow)
    if layer.bias is not None:
        moved = shadow.effective().flatten(1).double() - before
        layer.bias += (fit.lack - moved @ fit.input).to(layer.bias.dtype)


def _refitted(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The nearest to `weight`, in the norm of `hessian`, of the matrices that are zero where `kept` is not: all outputs
    at once, by conjugate gradients scaled by the diagonal. float64 [outputs, inputs], [inputs, inputs]; bool."""
    nearest = weight * kept
    left = (weight - nearest) @ hessian * kept
    direction = scaled = left / hessian.diagonal()
    energy = (left * scaled).sum(1, keepdim=True)
    for _ in range(_ROUNDS):
        turned = direction @ hessian * kept
        step = energy / (direction * turned).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        nearest = nearest + step * direction
        left = left - step * turned
        scaled, last = left / hessian.diagonal(), energy.clamp_min(torch.finfo(torch.float64).tiny)
        energy = (left * scaled).sum(1, keepdim=True)
        direction = scaled + energy / last * direction
    return nearest


def _damping(fit: _Fit) -> Tensor:
    """What is added to the diagonal of the Hessian: the fewer rows it was seen in, the more (oracle approximating
    shrinkage, Chen et al., 2010). float64 scalar."""
    n, trace, squares = len(fit.hessian), fit.hessian.trace(), fit.hessian.square().sum()
    spread = ((squares - trace.square() / n) * (fit.rows + 1 - 2 / n)).clamp_min(torch.finfo(torch.float64).tiny)
    share = (((1 - 2 / n) * squares + trace.square()) / spread).clamp(0, 0.99)
    return torch.clamp(share / (1 - share), min=_DAMPING) * trace / n + torch.finfo(torch.float32).tiny


def _recalibrate(norm: Norm, views: Iterator[tuple[_Seen, _Seen | None]]) -> None:
    """Statistics by which the channels have the mean and the variance that they have in the original; those of the
    channels where it has others."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own, others, known = list[Tensor](), list[Tensor](), True
    for seen, like in views:
        own.append(_channels(seen.input))
        known = known and like is not None
        others.append(_channels(like.input) if like is not None else own[-1])
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


def _channels(x: Tensor) -> Tensor:
    """float64 [channels, values]."""
    return x.transpose(0, 1).flatten(1).double()
