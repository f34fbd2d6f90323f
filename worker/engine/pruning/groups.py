"""Finding the channels of a program that can be removed together, with torch-pruning's dependency graph.

torch-pruning follows channels by heuristics and says nothing when one fails. So a group is taken only when every layer
in it is of a kind whose removal we know, and removal.py proves on real numbers that it was sound.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from worker.engine.programs.program import Program
from worker.engine.pruning.shapes import VIEWS, Shapes, record_shapes, split_axes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
SUPPORTED = (*CONVOLUTIONS, nn.Linear, *NORMS, nn.GroupNorm, nn.PReLU)
OPERATIONS = tuple(
    getattr(tp.ops, name)
    for name in ("_ElementWiseOp", "_ConcatOp", "_SplitOp", "_ReshapeOp", "_SliceOp", "_ExpandOp", "_UnbindOp")
)


@dataclass(frozen=True)
class Slot:
    """One layer of a group: `channels[k]` of it belong to the group's channels `roots[k]`."""

    name: str
    layer: nn.Module
    is_input: bool
    """The layer reads these channels; else it makes or scales them."""
    channels: np.ndarray
    roots: np.ndarray


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that several layers share. `units[k]` are those that must go together."""

    root: nn.Module
    root_name: str
    num_channels: int
    units: np.ndarray
    slots: tuple[Slot, ...]

    @property
    def makers(self) -> tuple[str, ...]:
        """The layers whose outputs become narrower."""
        return tuple(s.name for s in self.slots if not s.is_input and isinstance(s.layer, (*CONVOLUTIONS, nn.Linear)))


@dataclass(frozen=True)
class LeftAlone:
    """Layers that keep their width, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass
class Channels:
    """All channel groups of a module."""

    graph: tp.DependencyGraph
    groups: list[ChannelGroup]
    left: list[LeftAlone]

    def slots(self, group: ChannelGroup, channels: np.ndarray) -> Any:
        """Return torch-pruning's group for some of the channels, on the graph as it now is."""
        return self.graph.get_pruning_group(group.root, _out_handler(self.graph, group.root), channels.tolist())


def find_channels(program: Program, inputs: tuple[Tensor, ...], skip_layers: frozenset[str] = frozenset()) -> Channels:
    """Return the groups of the program's module. `inputs` are example inputs; the module ends up in eval mode."""
    module = program.module.eval()
    names = {layer: name for name, layer in module.named_modules()}
    shapes = record_shapes(module, inputs)
    with quiet():
        graph = tp.DependencyGraph().build_dependency(module, inputs, forward_fn=_forward, verbose=False)
    uses = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    tied = {name.rpartition(".")[0] for group in program.tied for name in group}
    groups: list[ChannelGroup] = []
    left: list[LeftAlone] = []
    visited: set[nn.Module] = set()
    for name, layer in module.named_modules():
        if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or layer in visited:
            continue
        if layer not in graph.module2node:
            left.append(LeftAlone((name,), "no gradient path connects it to an output"))
            continue
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        raw = graph.get_pruning_group(layer, _out_handler(graph, layer), list(range(count)))
        makers = [
            item.dep.target.module
            for item in raw.items
            if isinstance(item.dep.target.module, (*CONVOLUTIONS, nn.Linear))
            and graph.is_out_channel_pruning_fn(item.dep.handler)
        ]
        visited.update(makers)
        found = _examine(raw, count, graph, names, uses, tied, skip_layers)
        if isinstance(found, tuple):
            units = _form_units(found, count, module.graph, shapes)
            if isinstance(units, np.ndarray):
                groups.append(ChannelGroup(layer, name, count, units, found))
                continue
            found = units
        left.append(LeftAlone(tuple(names[maker] for maker in makers), found))
    return Channels(graph, groups, left)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch-pruning's warnings; what matters of them is found by our own checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # Multiplying makes every output an operation of its own, so that groups which reach it can be told.
    with torch.enable_grad():
        return [output * 1 for output in module(*inputs) if output.requires_grad]


def _out_handler(graph: tp.DependencyGraph, layer: nn.Module) -> Any:
    return graph.get_pruner_of_module(layer).prune_out_channels


def _examine(
    raw: Any,
    count: int,
    graph: tp.DependencyGraph,
    names: dict[nn.Module, str],
    uses: Counter[str],
    tied: set[str],
    skip_layers: frozenset[str],
) -> tuple[Slot, ...] | str:
    """Return the layers of a group, or why it must be left alone."""
    slots = []
    for item in raw.items:
        layer, channels = item.dep.target.module, np.asarray(item.idxs, dtype=np.int64)
        if isinstance(layer, tp.ops._OutputOp):
            return "its channels are an output of the model"
        if isinstance(layer, nn.Parameter):
            return "its channels meet a parameter that belongs to no layer"
        if isinstance(layer, OPERATIONS) or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
            continue
        if layer not in names or not isinstance(layer, SUPPORTED):
            return f"its channels reach {names.get(layer, '')} ({type(layer).__name__}), which keeps its width"
        name = names[layer]
        is_input = not graph.is_out_channel_pruning_fn(item.dep.handler)
        if not is_input and name in skip_layers:
            return f"{name} is in skip_layers"
        if uses[name] > 1:
            return f"{name} is called {uses[name]} times"
        if name in tied:
            return f"{name} shares its weight with another layer"
        width = _width(layer, is_input)
        if channels.min() < 0 or channels.max() >= width or len(item.root_idxs) != len(channels):
            return f"its channels could not be followed to {name}"
        roots = np.asarray(item.root_idxs, dtype=object)
        if any(root is None or not 0 <= root < count for root in roots):
            return f"its channels could not be followed to {name}"
        slots.append(Slot(name, layer, is_input, channels, roots.astype(np.int64)))
    if not any(slot.is_input for slot in slots):
        return "no layer that can become narrower reads its channels"
    return tuple(slots)


def _width(layer: nn.Module, is_input: bool) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features if is_input else layer.out_features
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels if is_input else layer.out_channels
    if isinstance(layer, NORMS):
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    assert isinstance(layer, nn.PReLU)
    return layer.num_parameters


def _form_units(slots: tuple[Slot, ...], count: int, graph: fx.Graph, shapes: Shapes) -> np.ndarray | str:
    """Return channels that must go together, one unit a row: heads, norm groups, or one channel of each conv group."""
    parts, width = 1, 1
    for slot in slots:
        layer = slot.layer
        if isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups != layer.out_channels:
            if layer.transposed or layer.groups == layer.in_channels or len(slot.channels) != count:
                return f"the groups of {slot.name} cannot become smaller evenly"
            parts = lcm(parts, layer.groups)
        elif isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups != layer.in_channels:
            return f"{slot.name} makes several channels of one"
        if isinstance(layer, nn.Linear) and not slot.is_input:
            heads = _find_head_width(slot.name, graph, shapes)
            if heads is not None:
                width = lcm(width, heads)
        if isinstance(layer, nn.GroupNorm):
            width = lcm(width, layer.num_channels // layer.num_groups)
    if width > 1 and parts > 1:
        return "convolution groups and whole heads or norm groups cannot both be kept"
    if count % (parts * width):
        return f"{count} channels cannot be divided into {parts} equal parts of whole units of {width}"
    units = np.arange(count).reshape(parts, -1, width).transpose(1, 0, 2).reshape(-1, parts * width)
    for slot in slots:
        if isinstance(slot.layer, nn.GroupNorm) and not _covers_whole_groups(slot, slot.layer, units):
            return f"the groups of {slot.name} mix its channels with others"
    return np.asarray(units)


def _covers_whole_groups(slot: Slot, norm: nn.GroupNorm, units: np.ndarray) -> bool:
    """Tell whether removing a unit removes whole groups of a norm, so that the other groups' statistics stay."""
    width = norm.num_channels // norm.num_groups
    for unit in units:
        channels = slot.channels[np.isin(slot.roots, unit)]
        groups = np.unique(channels // width)
        if len(groups) * width != len(channels):
            return False
    return True


def _find_head_width(name: str, graph: fx.Graph, shapes: Shapes) -> int | None:
    """Return the width of an attention head, where a linear layer's output is viewed as (heads, width)."""
    stack = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if user.op != "call_function":
                continue
            if user.target not in VIEWS:
                stack.append(user)
                continue
            before, after = shapes[user.name]
            if before is None or after is None or node is not user.args[0]:
                continue
            for left, right in split_axes(before, after):
                if left == [len(before) - 1] and len(right) > 1:
                    return after[-1]
    return None
