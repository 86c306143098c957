"""Post-training compression: what fine-tuning would repair, layer by layer and in closed form.

Layers are taken in the order in which they run, each with the inputs that the layers before it give by now. Its
weights are moved to where its outputs are the original's (least squares, He et al., ICCV 2017), so each layer makes up
for the errors of those before. Those go that are smallest times the norm of their input (Wanda, Sun et al., ICLR 2024)
and times what their output is worth (its curvature, as in Martens and Grosse, ICML 2015, but tempered), and what stays
of each output is fitted once more (conjugate gradients, Hestenes and Stiefel, 1952) and rounded: to the nearest or,
where bits have a price, to what costs little and moves the outputs little (`priced_rounding.py`). Biases make up for
what is left of the mean (Nagel et al., ICCV 2019), and batch norms see to it that each channel has the mean and the
variance that it had (EagleEye, Li et al., ECCV 2020, takes new statistics).

A layer that runs more than once is fitted to all of its runs. Weights of an embedding go that are smallest times the
root of how often their row is looked up, and what stays is rounded to the nearest; one that is the matrix of an output,
too, is fitted as that. Other layers that share their weight, have more than 8,192 inputs, or are no matrix
(`matrices.py`, `handed.py`) are pruned by magnitude and rounded likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autocompress.model.surgery import owners
from autocompress.recipe import Choice
from autocompress.techniques.base import IntegerCoding
from autocompress.trial.compression import Candidate, ShadowedLayer, asked, drawn_mask
from autocompress.trial.curvature import squared_gradients
from autocompress.trial.handed import Handed
from autocompress.trial.matrices import matrices, runs_as
from autocompress.trial.matrix import Call, Matrix, Weight, by_place, input_of
from autocompress.trial.priced_rounding import rounded
from autocompress.trial.rate import RateModel
from autocompress.trial.views import Samples, Views

_DAMPING, _LOOKED_UP = 0.01, 0.3
"""Share of the mean of a Hessian's diagonal that is added to it, at least; of a matrix whose rows are looked up."""
_ROUND_OFF = 1e-20
"""Of a Hessian, as a share of its trace before the means were taken out."""
_WIDEST = 8192
"""Inputs of the widest layer that is fitted: its Hessian has their square."""
_ROUNDS, _OUTPUTS = 20, 4096
"""Of conjugate gradients, and outputs at a time."""
_LOOKUPS = 1_000_000
"""By which it is counted how often the rows of an embedding are used."""
_BATCHES, _BATCH = 32, 6
"""By which the curvature is estimated: batches, and samples in each."""
_FLOOR = 0.3
"""Of the mean curvature, added to that of each output: errors that are no longer small are heard, too."""
_UNSEEN = 0.3
"""Of the mean times that a row of an embedding is looked up, added to those of each: rows that were not seen will be.
And of the mean of what groups are given (the experts of a mixture), for those that are given nothing."""
_RATIO = 1e-4, 1e4
"""By which a variance may change."""

Norm = nn.modules.batchnorm._BatchNorm
_TABLES = nn.Embedding, nn.EmbeddingBag


class _Part(NamedTuple):
    """A layer or a batch norm, by the module that runs it. matrix: None for an embedding or a norm. place: the
    module that ends, or the weight that is used, when it is its turn."""

    module: nn.Module
    matrix: Weight | None
    place: nn.Module | nn.Parameter


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
def reconstruct(candidate: Candidate, samples: Samples) -> None:
    """Prune and round the weights of `candidate`, in place, so that its layers' outputs are those of the original's."""
    views, targets = Views(samples, candidate.model), candidate.targets()
    order = views.in_order()
    known = _parts(candidate, order)
    parts = [(name, part) for place in order for name, part in known.items() if part.place is place]
    fitted = {name: candidate.layers[name] for name, part in parts if part.matrix is not None}
    price = float(RateModel(candidate).of_bit(torch.tensor(candidate.penalty))) if candidate.penalty else 0.0
    weights = {name: shadow.parameter for name, shadow in fitted.items() if price or asked(targets[name])}
    squares = squared_gradients(samples.task, candidate.model, weights, samples.small_batches(_BATCHES, _BATCH))
    candidate.materialise()
    for shadow in fitted.values():
        shadow.write(shadow.out_of_basis(shadow.dense))
    for name, part in parts:
        match part:
            case _Part(Norm() as norm, None, _):
                _recalibrate(norm, views.of(norm))
            case _Part(table, None, _) if asked(targets[name]):
                _thin_out(candidate, candidate.layers[name], views.of(table, _LOOKUPS), targets[name])
            case _Part(module, Weight() as weight, place):
                first = isinstance(place, _TABLES)  # nothing is changed yet of what it is given as a matrix
                found = _fit(weight, views.of(module, alone=first), lacks=not first)
                if found is not None:
                    damping = _LOOKED_UP if first else _DAMPING
                    _compress(candidate, fitted[name], *found, squares.get(name), targets[name], damping, price)
                fitted[name].write(fitted[name].effective())


def _parts(candidate: Candidate, order: Mapping[nn.Module | nn.Parameter, None]) -> dict[str, _Part]:
    """Name -> layer that can be fitted, embedding, or batch norm. order: the modules that run, and the weights that are
    used as matrices."""
    places, known, out = owners(candidate.model), matrices(candidate.model), dict[str, _Part]()
    for name, shadow in candidate.layers.items():
        own = places[shadow.key]
        tables = [module for module, _ in own if module in order and runs_as(module, *_TABLES)]
        running = [known[place] for place in own if place in known and known[place][0] in order]
        used = shadow.parameter in order
        if tables:  # of an output that shares it: by what that is given
            module, weight = running[0] if running else (candidate.model, Handed(shadow.key))
            out[name] = _Part(module, weight, tables[0]) if used else _Part(tables[0], None, tables[0])
        elif len(own) > 1 or shadow.parameter.is_complex():
            continue
        elif running:
            module, weight = running[0]
            out[name] = _Part(module, weight, shadow.parameter if isinstance(weight, Handed) else module)
        elif used:  # by a module around the one that has it (the attention of torchvision's Swin transformers)
            path, _, attribute = shadow.key.rpartition(".")
            parent, _, child = path.rpartition(".")
            weight = Handed(f"{child}.{attribute}" if child else attribute)
            out[name] = _Part(candidate.model.get_submodule(parent), weight, shadow.parameter)
    for name, module in candidate.model.named_modules():
        if isinstance(module, Norm) and module.running_var is not None:
            out[name] = _Part(module, None, module)
    return out


def _fit(
    weight: Weight, views: Iterator[tuple[Call, Call | None]], lacks: bool = True
) -> tuple[Matrix, Tensor | None, _Fit] | None:
    """With the matrix that it is, and its bias. None if the layer does not run any more, is given nothing, has too many
    inputs, or turns out to be no matrix. lacks: whether its outputs may differ from the original's."""
    sums: list[list[Tensor]] = []
    origins: list[tuple[Tensor, Tensor]] = []
    for seen, like in views:
        own = weight.seen(seen)
        if own is None:
            return None
        matrix, call = own
        outputs, bias = matrix.outputs(call), matrix.bias(call.module)
        others = None if like is None or matrix.routed else weight.seen(like)
        wanted = others[0].outputs(others[1]) if others else outputs
        pairs = [*zip(matrix.rows(call), outputs, wanted, strict=True)]
        if any(x.shape[2] > _WIDEST for x, _, _ in pairs):
            return None
        rows = [(x.double(), (z - y).double() if lacks else y[:, :, :0].double()) for x, y, z in pairs]
        if not sums:
            sums = [_sums(a[:, :0], d[:, :0]) for a, d in rows]
            # counted from near their mean: what is left when that is taken out is not round-off
            origins = [(_origin(a, bias is not None), _origin(d, bias is not None)) for a, d in rows]
        for part, (a, d), (x, y) in zip(sums, rows, origins, strict=True):
            for known, more in zip(part, _sums(a - x, d - y), strict=True):
                known += more
    if not sums:
        return None
    count, hessian, pull, total, lacking = map(torch.cat, zip(*sums, strict=True))
    unused = count == 0
    if unused.all():
        return None
    count[unused] = 1
    hessian[unused] = _UNSEEN * hessian[~unused].mean(0)
    input, lack = total / count[:, None], lacking / count[:, None]
    if bias is not None:
        hessian -= total[:, :, None] * input[:, None]
        pull -= total[:, :, None] * lack[:, None]
    x, y = (torch.cat(each)[:, 0] for each in zip(*origins, strict=True))
    lack = lack + y
    if not lacks:
        pull, lack = (each.new_zeros(*each.shape[:-1], outputs[0].shape[2]) for each in (pull, lack))
    return matrix, bias, _Fit(count, hessian, pull, input + x, lack)


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
    squares: Tensor | None,
    targets: Mapping[str, Choice],
    damping: float,
    price: float,
) -> None:
    """The weights, the mask and the steps that make what the file will hold, and the bias that goes with them.
    squares: of the gradients of the weights, where they are known. damping: at least. price: of a bit, in nats."""
    groups, shape, fit = len(fit.rows), shadow.dense.shape, _in_basis(fit, shadow)
    before = matrix.grouped(shadow.dense, groups).double()
    diagonal = _diagonal(fit.hessian) + _damping(fit, damping)[:, None]
    hessian = fit.hessian.diagonal_scatter(diagonal, dim1=1, dim2=2)
    best = weight = before + torch.cholesky_solve(fit.pull, torch.linalg.cholesky(hessian)).mT
    squares = None if squares is None else matrix.grouped(squares, groups).double()
    worth = torch.ones_like(weight[:, :, :1]) if squares is None else _worth(squares)
    saliency = weight * (diagonal[:, None] * worth.sqrt()).sqrt()
    mask = drawn_mask(matrix.restored(saliency, shape).float(), targets)
    if mask is not None:
        shadow.mask, weight = mask.float(), _refitted(weight, hessian, matrix.grouped(mask, groups))
    shadow.dense = matrix.restored(weight, shape).float()
    candidate.fit_steps(shadow)
    nats = 0.0 if squares is None else float(squares.mean() / diagonal.mean()) / 2
    if price and 0 < nats < math.inf:
        _round(shadow, matrix, best, hessian, price / nats / worth)
    if bias is not None:
        moved = matrix.grouped(shadow.coefficients(), groups).double() - before
        bias += (fit.lack - (moved @ fit.input[:, :, None])[:, :, 0]).flatten().to(bias.dtype)


def _round(shadow: ShadowedLayer, matrix: Matrix, best: Tensor, hessian: Tensor, price: Tensor) -> None:
    """By the price of a bit of each output, if the weights have steps."""
    coding, shape, groups = shadow.coding, shadow.dense.shape, len(hessian)
    if not isinstance(coding, IntegerCoding):
        return
    steps = coding.steps(shadow.choice, shadow.learned, len(shape))
    if steps is None:
        return

    def grouped(weight: Tensor) -> Tensor:
        return matrix.grouped(weight.double().expand(shape), groups)

    size, start = grouped(steps.size), grouped(coding.scaled(shadow.masked(), shadow.choice, shadow.learned).round())
    free = torch.ones_like(start, dtype=torch.bool) if shadow.mask is None else grouped(shadow.mask).bool()
    codes = rounded(start, free, best, hessian, price, steps._replace(size=size))
    shadow.dense = matrix.restored(codes * size, shape).float()


def _in_basis(fit: _Fit, shadow: ShadowedLayer) -> _Fit:
    """As if the layer were given the coefficients of its inputs."""
    if shadow.basis is None:
        return fit
    basis, kernel = shadow.basis, shadow.dense.shape[2:]

    def turned(values: Tensor) -> Tensor:
        rows = values.reshape(-1, 1, *kernel) if kernel else values.reshape(-1, values.shape[-1])
        return basis.analysed(rows).reshape(values.shape)

    hessian = turned(turned(fit.hessian).mT)
    return fit._replace(hessian=hessian, pull=turned(fit.pull.mT).mT, input=turned(fit.input))


def _worth(squares: Tensor) -> Tensor:
    """Of each output, float64 [groups, outputs, 1]: its curvature, about 1 in the mean. squares: of the gradients of
    its weights, float64 [groups, outputs, inputs]."""
    curvature = squares.mean(2, keepdim=True)
    mean = curvature.mean()
    return (curvature / mean + _FLOOR) / (1 + _FLOOR) if 0 < mean < math.inf else torch.ones_like(curvature)


def _thin_out(
    candidate: Candidate,
    shadow: ShadowedLayer,
    views: Iterator[tuple[Call, Call | None]],
    targets: Mapping[str, Choice],
) -> None:
    """The mask of an embedding, and the steps that go with it."""
    uses = torch.zeros_like(shadow.dense[:, 0])
    for seen, _ in views:
        uses += torch.bincount(input_of(*seen.args, **seen.kwargs).flatten(), minlength=len(uses))
    mask = drawn_mask(shadow.dense * (uses + _UNSEEN * uses.mean()).sqrt()[:, None], targets)
    assert mask is not None
    shadow.mask = mask.float()
    candidate.fit_steps(shadow)
    shadow.write(shadow.effective())


def _refitted(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The nearest to `weight`, in the norm of `hessian`, of the matrices that are zero where `kept` is not. float64
    [groups, outputs, inputs], [groups, inputs, inputs]; bool."""
    parts = zip(torch.split(weight, _OUTPUTS, 1), torch.split(kept, _OUTPUTS, 1), strict=True)
    return torch.cat([_nearest(part, hessian, stays) for part, stays in parts], 1)


def _nearest(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """By conjugate gradients scaled by the diagonal."""
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


def _damping(fit: _Fit, least: float = _DAMPING) -> Tensor:
    """What is added to the diagonal of the Hessians: the fewer rows they were seen in, the more (oracle approximating
    shrinkage, Chen et al., 2010), and more than what is left of inputs that never change. float64 [groups]."""
    n, trace, squares = fit.hessian.shape[1], _diagonal(fit.hessian).sum(1), fit.hessian.square().sum((1, 2))
    spread = ((squares - trace.square() / n) * (fit.rows + 1 - 2 / n)).clamp_min(torch.finfo(torch.float64).tiny)
    share = (((1 - 2 / n) * squares + trace.square()) / spread).clamp(0, 0.99)
    noise = _ROUND_OFF * (trace + fit.rows * fit.input.square().sum(1)) + torch.finfo(torch.float32).tiny
    return torch.clamp(share / (1 - share), min=least) * trace / n + noise


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
