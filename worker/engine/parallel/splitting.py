"""Tensor parallel: attention heads and hidden channels of feed-forward layers, split among ranks.

The plan is found in the imported graph: a group of channels that pruning could remove between linear layers can be
divided as well, where nothing between them looks at several channels at once. Each rank keeps its part of the channels,
as if the others had been pruned; layers that make them are split by outputs, those that read them by inputs, and the
partial results of these are summed (Shoeybi et al. 2019).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn import functional

from worker.engine.devices import CPU, device_of
from worker.engine.errors import RecipeRefused
from worker.engine.parallel.group import Group
from worker.engine.parallel.region import Region, find_region
from worker.engine.programs.placement import move_module
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import ChannelGroup, Channels, Place
from worker.engine.pruning.labels import Ids
from worker.engine.pruning.removal import find_sound_channels, remove_channels


@dataclass(frozen=True)
class Slice:
    """What each rank of the tensor axis holds of a parameter."""

    shape: torch.Size
    """Of the whole."""
    axis: int
    positions: tuple[Tensor, ...]
    """Of every rank, on the axis."""


@dataclass
class Split:
    """A program's module with a part of the channels, and the way back."""

    group: Group
    slices: dict[nn.Parameter, Slice] = field(default_factory=dict)
    num_groups: int = 0
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def take(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor that is shaped like the whole parameter."""
        found = self.slices.get(parameter)
        if found is None:
            return whole
        return whole.index_select(found.axis, found.positions[self.group.coordinate("tensor")])

    def join(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Return the whole tensor of which every rank has a part that is shaped like its part of a parameter."""
        found = self.slices.get(parameter)
        if found is None:
            return part
        everyone = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in found.positions]
        with self.group.waiting():
            dist.all_gather(everyone, part.contiguous(), group=self.group.along("tensor"))
        whole = part.new_empty(found.shape)
        for positions, each in zip(found.positions, everyone, strict=True):
            whole.index_copy_(found.axis, positions, each)
        return whole

    def undo(self) -> None:
        """Put the whole weights together on every rank, and the module as it was around them."""
        for parameter in self.slices:
            parameter.data, parameter.grad = self.join(parameter, parameter.detach()), None
        for each in reversed(self._undo):
            each()


def split_channels(program: Program, group: Group) -> Split:
    """Divide what can be divided; raises RecipeRefused with code no_tensor_plan where nothing can."""
    size, mine = group.plan.tensor, group.coordinate("tensor")
    device = device_of(program.module)
    move_module(program.module, CPU)  # where the analysis has its examples
    channels = find_sound_channels(program)
    found = _choose(program, channels, size)
    chosen = [each for each, _ in found]
    if not chosen:
        raise RecipeRefused(
            f"no pair of linear layers of this model has channels or heads between them that {size} ranks could share "
            "equally",
            code="no_tensor_plan",
            fix="Use data or pipeline instead of tensor, or a number of ranks that divides heads and hidden channels.",
        )
    others = {each.name: _others(each.num_units, size, mine) for each in chosen}
    small = remove_channels(program, channels, others)
    assert not small.left, f"groups proven one by one fail together: {small.left}"
    split = Split(group, num_groups=len(chosen))
    _shrink(program.module, small.program.module, split)
    move_module(program.module, device)
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    readers = dict[str, None]()
    for each in chosen:
        for place in each.places:
            positions = tuple(
                torch.from_numpy(place.positions[place.units // (each.num_units // size) == rank]).to(device)
                for rank in range(size)
            )
            parameter = parameters[place.parameter]
            shape = list(parameter.shape)
            shape[place.axis] = sum(map(len, positions))
            split.slices[parameter] = Slice(torch.Size(shape), place.axis, positions)
            if "in" in place.roles:
                readers[place.parameter.rpartition(".")[0]] = None
    for name in readers:
        layer = program.module.get_submodule(name)
        layer.forward = partial(_read, cast(nn.Linear, layer), group)
        split._undo.append(partial(delattr, layer, "forward"))
    _sum_what_enters(program.module, [region for _, region in found], split)
    return split


def _choose(program: Program, channels: Channels, size: int) -> list[tuple[ChannelGroup, Region]]:
    """Return the groups between linear layers, each layer and each value in one of them only, and where they are."""
    chosen, taken = [], set[str | fx.Node]()
    for each in channels.groups:
        layers = {place.parameter.rpartition(".")[0] for place in each.places}
        fits = each.num_units % size == 0 and each.structure in ("heads", "hidden_units") and not layers & taken
        if fits and all(_is_divisible(program, place) for place in each.places):
            region = find_region(program, channels.flow, each)
            if region is not None and taken.isdisjoint(region.nodes):
                chosen.append((each, region))
                taken |= layers | set(region.nodes)
    return chosen


def _is_divisible(program: Program, place: Place) -> bool:
    """Whether a place is a whole axis of a linear layer: what reads other channels too would add those up twice."""
    layer, _, name = place.parameter.rpartition(".")
    if not isinstance(program.module.get_submodule(layer), nn.Linear):
        return False
    if len(place.positions) != program.module.get_parameter(place.parameter).shape[place.axis]:
        return False
    return place.roles == {"in"} if (name, place.axis) == ("weight", 1) else place.roles == {"out"}


def _others(num_units: int, size: int, mine: int) -> Ids:
    units = np.arange(num_units)
    return cast(Ids, units[units // (num_units // size) != mine])


def _shrink(module: fx.GraphModule, small: fx.GraphModule, split: Split) -> None:
    """Give a module the smaller weights, sizes and graph of its pruned copy, keeping its parameter objects."""
    graph = module.graph
    smaller = dict(small.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.shape != smaller[name].shape:
            parameter.data = smaller[name].detach().clone()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            before = (layer.out_features, layer.in_features)
            layer.out_features, layer.in_features = layer.weight.shape
            split._undo.append(partial(_resize, layer, before))
    module.graph = small.graph
    split._undo.append(partial(setattr, module, "graph", graph))


def _resize(layer: nn.Linear, sizes: tuple[int, int]) -> None:
    layer.out_features, layer.in_features = sizes


def _sum_what_enters(module: fx.GraphModule, regions: list[Region], split: Split) -> None:
    """Let the gradients of all that ranks have whole, and compute with their own channels, be summed."""

    def enter(x: Tensor) -> Tensor:
        return cast(Tensor, _SumGradients.apply(x, split.group))  # type: ignore[no-untyped-call]

    nodes = {node.name: node for node in module.graph.nodes}
    users: dict[str, set[str]] = {}
    for region in regions:
        for user, source in region.entries:
            users.setdefault(source.name, set()).add(user.name)
        for name in region.layers:
            for parameter in module.get_submodule(name).parameters():
                if parameter.requires_grad:
                    split._undo.append(parameter.register_hook(partial(split.group.sum, axis="tensor")).remove)
    for source_name, names in users.items():
        with module.graph.inserting_before(next(node for node in module.graph.nodes if node.name in names)):
            entering = module.graph.call_function(enter, (nodes[source_name],))
        for name in names:
            nodes[name].replace_input_with(nodes[source_name], entering)
    module.recompile()


def _read(layer: nn.Linear, group: Group, x: Tensor) -> Tensor:
    partial_sum = functional.linear(x, layer.weight)
    total = cast(Tensor, _SumValues.apply(partial_sum, group))  # type: ignore[no-untyped-call]
    return total if layer.bias is None else total + layer.bias.to(total.dtype)


class _SumValues(torch.autograd.Function):
    """Sum over the tensor axis forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004
        return group.sum(x, "tensor")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


class _SumGradients(torch.autograd.Function):
    """Nothing forward, sum over the tensor axis backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradient.contiguous(), "tensor"), None
