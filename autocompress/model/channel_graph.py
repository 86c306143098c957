"""Channels that can only be removed together, found by Torch-Pruning: which layers make and take them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group

from autocompress.errors import in_words
from autocompress.model.attention import Attention
from autocompress.model.hooks import forward_hooks
from autocompress.model.reach import Reach, reaches
from autocompress.model.replacement import Elementwise, channel_makers
from autocompress.model.surgery import owners, resizable, update_attributes
from autocompress.model.tracing import EndlessError, Following, mended, quiet
from autocompress.nested import close, leaves

Run = Callable[[nn.Module], Any]
"""Runs a model on a calibration batch and returns its output."""
Snapshot = tuple[list[tuple[nn.Module, dict[str, Any]]], dict[Any, Any], dict[Any, str]]
"""Attributes of each module; nodes of the graph, by module or parameter; names of parameters."""


class ChannelGraph:
    """Torch-Pruning's dependency graph of one model (Fang et al., DepGraph, CVPR 2023). only: the groups to look at, by
    name; all by default."""

    def __init__(self, model: nn.Module, run: Run, only: Collection[str] = ()) -> None:
        self.model, self._run = model, run

        def outputs(module: nn.Module, _: Any) -> list[Tensor]:
            return [leaf for leaf in leaves(run(module)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]

        # what they compute would be followed operation by operation, through the sorting and reshaping of it, too
        passed = ((module, _input) for module in model.modules() if isinstance(module, Elementwise))
        made_of_layers = [module for module in model.modules() if isinstance(module, Attention)]
        following = Following()
        with quiet(), mended(), torch.enable_grad(), forward_hooks(passed), following:
            self._graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=None, forward_fn=outputs, ignored_layers=made_of_layers
            )
        self._heads, self._parts, self._splits = following.heads, following.parts, following.splits
        self._up_to_date = True
        self._ties = [
            [[place for place in places if (place[0] in self._graph.module2node) == runs] for runs in (True, False)]
            for places in owners(model).values()
            if len(places) > 1
        ]
        """Of each shared tensor, where it is in modules that run and in others."""
        self.names = channel_makers(model)
        self.groups: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        order = [*self.names.values()]
        for group in self._groups(only):
            name = min((self.names[id(maker)] for maker in self._makers(group)), key=order.index)
            reason = self._why_not(group, name)
            if reason:
                self.refused[name] = reason
            else:
                self.groups[name] = group
        for found in self._reaches(only):
            self._add(found)

    def _reaches(self, only: Collection[str]) -> list[Reach]:
        """Channels that are not followed, or to nobody who takes them, but found by trying."""
        taken = [group for group in self.groups.values() if any(self._takes(item.dep) for item in group)]
        made = {maker for group in taken for maker in self._makers(group)}
        layers = [layer for layer in self._graph.module2node if isinstance(layer, nn.Linear)]
        tied = {module for places, _ in self._ties for module, _ in places}
        among = [layer for layer in layers if layer not in made and layer not in tied]
        wanted = [layer for layer in among if self.names[id(layer)] in only or not only]
        try:
            return reaches(self.model, self._run, among, wanted) if wanted else []
        except Exception:  # whatever a model's own code makes of other numbers
            return []

    def _add(self, found: Reach) -> None:
        """The group of these channels, if the model does not miss the first unit of them."""
        layers, order = [*found.makers, found.taker], [*self.names.values()]
        if any(found.taker in dict(places) for places, _ in self._ties):
            return
        first = min(range(len(found.makers)), key=lambda at: order.index(self.names[id(layers[at])]))
        units = [[*outputs, inputs] for outputs, inputs in found.units]
        group = self._found(units=[unit[first] for unit in units])
        for at in sorted(range(len(layers)), key=lambda at: at != first):
            pruner, node = self._graph.get_pruner_of_module(layers[at]), self._graph.module2node[layers[at]]
            prune = pruner.prune_in_channels if layers[at] is found.taker else pruner.prune_out_channels
            places = sorted((i, unit[first][k % len(unit[first])]) for unit in units for k, i in enumerate(unit[at]))
            dep = Dependency(prune, prune, self._graph.module2node[layers[first]], node)
            group.add_dep(dep, [index for index, _ in places])
            group[-1].root_idxs = [root for _, root in places]
        if self._misses_nothing(group, found.taker, units[0][-1]):
            for maker in {self.names[id(maker)] for maker in found.makers}:
                self.groups.pop(maker, None)
                self.refused.pop(maker, None)
            self.groups[self.names[id(layers[first])]] = group

    def _found(self, items: Collection[Any] = (), units: Collection[list[int]] = ()) -> Any:
        """A group that Torch-Pruning would not find, of channels that stay where they are. units: which go together, if
        the members do not tell."""
        group = Group()
        group._DG, group._group, group.units = self._graph, [*items], units
        return group

    @torch.no_grad()
    def _misses_nothing(self, group: Any, taker: nn.Linear, inputs: list[int]) -> bool:
        """Whether the model's outputs without the first unit are those it has when the taker ignores these inputs."""
        before, weight = self.snapshot(), taker.weight.detach().clone()
        weight[:, inputs] = 0
        try:
            taker.weight = nn.Parameter(weight)
            silent = self._run(self.model)
            self.restore(before)
            self._prune(_part_of(group, group.units[0]))
            return close(silent, self._run(self.model))
        except Exception:  # whatever a model's own code makes of it
            return False
        finally:
            self.restore(before)

    def _groups(self, only: Collection[str]) -> Iterator[Any]:
        """That of each layer with channels which is not in one before; those that cannot be followed are refused."""
        layers = [m for m in self._graph.module2node if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
        seen: set[nn.Module] = set()
        for layer in layers:
            name = self.names[id(layer)]
            if layer in seen or self._graph.get_pruner_of_module(layer) is None or (only and name not in only):
                continue
            try:
                group = self._of(layer)
                if only:  # it begins where it does when all are looked at: there its channels are counted
                    makers = self._makers(group)
                    first = next(maker for maker in layers if maker in makers)
                    group = group if first is layer else self._of(first)
            except EndlessError as endless:
                makers = self._makers(endless.group)
                reason = f"its channels cannot be followed: {endless}"
                self.refused |= {self.names[id(maker)]: reason for maker in makers}
                seen.update(makers)
            except Exception as error:
                self.refused[name] = f"its channels cannot be followed: {in_words(error)}"
            else:
                seen.update(self._makers(group))
                yield group

    def _of(self, layer: nn.Module) -> Any:
        """The group of the channels that the layer makes or, if only some that another makes are among them (a split is
        between), of all of that one."""
        group = self._all_of(layer)
        others = (self._all_of(maker) for maker in self._divided(group))
        return self._joined(next((other for other in others if not self._divided(other)), group))

    def _joined(self, group: Any) -> Any:
        """With those of the layers that share a weight with one of it, if all have their channels in the same order."""
        every, items, inside = [*range(len(group[0].idxs))], [*group], _modules(group)
        for item in items:  # which become more
            for other in [module for module in self._tied(item.dep) if module not in inside]:
                pruner, looked_up = self._graph.get_pruner_of_module(other), isinstance(other, nn.Embedding)
                if self._makes(item.dep) or not isinstance(other, (nn.Embedding, nn.Linear)):
                    return group
                more = self._group(other, pruner.prune_out_channels if looked_up else pruner.prune_in_channels, every)
                items += more
                inside |= _modules(more)
        alike = all(item.idxs == item.root_idxs == every for item in items)
        return self._found(items) if alike and len(items) > len(group) else group

    def _all_of(self, layer: nn.Module) -> Any:
        pruner = self._graph.get_pruner_of_module(layer)
        return self._group(layer, pruner.prune_out_channels, [*range(pruner.get_out_channels(layer))])

    def _divided(self, group: Any) -> list[nn.Module]:
        """Layers that make other channels than those of the group, too."""
        made = (item for item in group if self._makes(item.dep))
        return [x.dep.target.module for x in made if len(x.idxs) < self._graph.get_out_channels(x.dep.target)]

    def _group(self, layer: nn.Module, pruning_fn: Any, channels: list[int]) -> Any:
        """What goes with these channels of a layer."""
        with quiet(), mended():
            if not self._up_to_date:
                index_mapping.update_index_mapping(self._graph)
                self._up_to_date = True
            with mock.patch.object(index_mapping, "update_index_mapping"):  # most of the time, asked once more
                return self._graph.get_pruning_group(layer, pruning_fn, channels)

    def _makers(self, group: Any) -> list[nn.Module]:
        return [item.dep.target.module for item in group if self._makes(item.dep)]

    def _makes(self, dep: Any) -> bool:
        """Whether this member produces the channels (and is a layer with weights)."""
        return isinstance(dep.target.module, (nn.modules.conv._ConvNd, nn.Linear)) and bool(
            self._graph.is_out_channel_pruning_fn(dep.handler)
        )

    def _takes(self, dep: Any) -> bool:
        """Whether this member is a layer with weights that is given the channels."""
        return isinstance(dep.target.module, (nn.modules.conv._ConvNd, nn.Linear)) and not self._makes(dep)

    def _why_not(self, group: Any, name: str) -> str:
        inside = _modules(group)
        for item in group:
            module = item.dep.target.module
            if type(module).__module__.startswith("torch_pruning"):
                continue
            if isinstance(module, nn.Parameter):
                module = self._owner(module)
            through = self.names[id(module)]
            if not inside.issuperset(self._tied(item.dep)):
                shares = "shares a weight with another layer"
                return shares if through == name else f"its channels pass through {through}, which {shares}"
            if not resizable(module) or not _has_just(module, item):
                return f"its channels pass through {through} ({type(module).__name__})"
            if not self._has(item):
                return f"its channels cannot be followed into {through}"
        return ""

    def _tied(self, dep: Any) -> list[nn.Module]:
        """The modules that share a tensor with this member which has these channels, and it itself."""
        module, makes = dep.target.module, self._makes(dep)
        return [
            other
            for places, _ in self._ties
            if module in dict(places) and (makes or getattr(*places[0]).ndim > 1)
            for other, _ in places
        ]

    def _has(self, item: Any) -> bool:
        """Whether there are such channels: joined and split ones are at times found where there are none."""
        graph, dep = self._graph, item.dep
        makes = graph.is_out_channel_pruning_fn(dep.handler)
        count = graph.get_out_channels(dep.target) if makes else graph.get_in_channels(dep.target)
        return count is None or all(index < count for index in item.idxs)

    def _owner(self, parameter: nn.Parameter) -> nn.Module:
        """Whose it is; it is none of a layer that is known."""
        return self.model.get_submodule(self._graph._param_to_name[parameter].rpartition(".")[0])

    def channels(self, name: str) -> int:
        return len(self.groups[name][0].idxs)

    def members(self, name: str) -> list[tuple[str, str]]:
        """(module name, "out" or "in") of each layer that the group reaches."""
        out = []
        for dep, _ in self.groups[name]:
            module = dep.target.module
            if id(module) in self.names and not type(module).__module__.startswith("torch_pruning"):
                makes = self._graph.is_out_channel_pruning_fn(dep.handler)
                out.append((self.names[id(module)], "out" if makes else "in"))
        return out

    def importance(self, name: str, measure: Callable[[Any], Any]) -> Tensor:
        """Float [channels] by a measure of Torch-Pruning's kind: group -> one number a channel."""
        # whose scales of several dimensions the measures do not know
        judged = [
            item for item in self.groups[name] if len(getattr(item.dep.target.module, "normalized_shape", ())) < 2
        ]
        with quiet():
            return torch.as_tensor(measure(judged)).detach()

    def weights(self, name: str) -> int:
        """Elements of the tensors that these channels are a part of."""
        modules = {dep.target.module for dep, _ in self.groups[name] if isinstance(dep.target.module, nn.Module)}
        return max(1, sum(p.numel() for module in modules for p in module.parameters(recurse=False)))

    def makers(self, name: str) -> list[nn.Module]:
        """The layers that make the channels of this group, and no fewer."""
        group, count = self.groups[name], self.channels(name)
        return self._makers([item for item in group if len(item.idxs) == count])

    def coupled(self, name: str) -> list[list[int]]:
        """The channels of the group, those that can only go together as one: as after a concatenation with what was
        computed of them, one of each group that a norm has, of each part that they are split into, or of each head of
        an attention, or a whole head."""
        if known := getattr(self.groups[name], "units", None):
            return [*known]
        units = self._units(name)
        steps = {dep.target.grad_fn for dep, _ in self.groups[name]}
        if steps.isdisjoint((*self._heads, *self._parts)) or self._runs_without(name, units[0]):
            return units
        every = [sorted(itertools.chain(*units))]
        return next((found for found in self._across(name, units, steps) if self._runs_without(name, found[0])), every)

    def _across(self, name: str, units: list[list[int]], steps: set[Any]) -> Iterator[list[list[int]]]:
        """One unit of each part or head together, or all of a head; none where the channels of a layer are not all
        followed, as where queries share keys. steps: of the graph of gradients, which the channels go through."""
        if self._divided(self.groups[name]):
            return
        for known in (self._parts, self._heads):
            for many in sorted({known.get(step, 1) for step in steps} - {1}):
                width = len(units) // many
                if width * many == len(units):
                    yield [sorted(itertools.chain(*units[at::width])) for at in range(width)]
                    if known is self._heads:  # parts that are told by their number do not stand for themselves
                        yield [sorted(itertools.chain(*units[at : at + width])) for at in range(0, len(units), width)]

    @torch.no_grad()
    def _runs_without(self, name: str, channels: list[int]) -> bool:
        before = self.snapshot()
        try:
            self.remove(name, channels)
            with Following() as following:
                self._run(self.model)
        except Exception:  # whatever a model's own code makes of it
            return False
        finally:
            self.restore(before)
        return bool(following.splits == self._splits)  # else places were taken for channels

    def _units(self, name: str) -> list[list[int]]:
        """As `coupled`, but for heads."""
        group, root, each = self.groups[name], self.groups[name][0].dep, range(self.channels(name))
        norms = [dep.target.module for dep, _ in group if isinstance(dep.target.module, nn.GroupNorm)]
        apart = len(each) // math.lcm(*(norm.num_groups for norm in norms))

        def unit(channel: int) -> tuple[int, ...]:
            group = self._group(root.target.module, root.handler, [channel])
            return tuple(sorted({i for dep, found in group if dep.target is root.target for i in found}))

        alone = all(item.idxs == item.root_idxs for item in group) or unit(0) == (0,)  # then all are
        if alone:
            return [[*each[channel::apart]] for channel in range(apart)]
        return [[*each]] if apart < len(each) else [[*unit] for unit in dict.fromkeys(map(unit, each))]

    def snapshot(self) -> Snapshot:
        """What `remove` changes, for `restore`."""
        followed = {module for module in self._graph.module2node if isinstance(module, nn.Module)}
        attributes = [(module, _copied(vars(module))) for module in followed.union(self.model.modules())]
        return attributes, self._graph.module2node.copy(), self._graph._param_to_name.copy()

    def restore(self, snapshot: Snapshot) -> None:
        attributes, nodes, names = snapshot
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(_copied(before))
        for module, node in nodes.items():
            node.module = module
        self._graph.module2node, self._graph._param_to_name = nodes.copy(), names.copy()
        self._up_to_date = False

    def remove(self, name: str, channels: list[int]) -> None:
        """Remove these channels physically from every layer of the group."""
        group = self.groups[name]
        if hasattr(group, "units"):
            self._prune(_part_of(group, channels))
        else:
            self._prune(self._group(group[0].dep.target.module, group[0].dep.handler, channels))

    def _prune(self, group: Any) -> None:
        with quiet():
            group.prune(record_history=False)
        for dep, _ in group:
            if isinstance(dep.target.module, nn.Parameter):
                update_attributes(self._owner(dep.target.module))
        for running, idle in self._ties:
            tensors = [getattr(*place) for place in running]
            if not all(tensor is tensors[0] or torch.equal(tensor, tensors[0]) for tensor in tensors):
                raise ValueError("a weight that is shared does not lose the same channels everywhere")
            for module, name in [*running, *idle] if tensors else ():
                setattr(module, name, tensors[0])
            for module, _ in idle:
                update_attributes(module)
        self._up_to_date = False


def _part_of(group: Any, channels: Collection[int]) -> Any:
    """These channels of the first member, and those of the others that are theirs."""
    part, gone = Group(), {*channels}
    part._DG = group._DG
    for item in group:
        part.add_dep(item.dep, [i for i, root in zip(item.idxs, item.root_idxs, strict=True) if root in gone])
    return part


def _modules(group: Any) -> set[Any]:
    """Of its members."""
    return {item.dep.target.module for item in group}


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if type(value) in (dict, list) else value for name, value in attributes.items()}


def _has_just(module: nn.Module, item: Any) -> bool:
    """Whether each group of a norm can lose as many channels: when it has those of this member, and no others."""
    if not isinstance(module, nn.GroupNorm) or module.num_groups == 1:
        return True
    return bool(item.root_idxs == item.idxs == [*range(module.num_channels)])


def _input(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return args[0]
