"""Removing chosen channels from a program, with a proof that nothing else changed.

The proof: in a copy of the original, every layer that reads a removed channel gets zero weights for it, and every norm,
mean or sum leaves it out. That copy computes exactly what the smaller model must compute. Where the two differ on
example inputs, the group was not understood, and it is left alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from worker.engine.programs.layers import arguments_of
from worker.engine.programs.program import Program
from worker.engine.pruning.flow import Flow
from worker.engine.pruning.groups import ChannelGroup, Channels, LeftAlone, find_channels
from worker.engine.pruning.labels import Ids
from worker.engine.pruning.operator_rules import operator_name, slice_bounds
from worker.engine.pruning.shapes import allowed_batch

TOLERANCE = 1e-3
"""Largest error of the smaller model's outputs, as a share of their norm: float32 noise of sums in another order."""
EXAMPLE_BATCH, OTHER_BATCH = 2, 5
Chosen = dict[str, Ids]
"""Name of a group -> indices of the units to remove."""
aten = torch.ops.aten


@dataclass(frozen=True)
class Removal:
    """A program with channels removed, and the groups that turned out not to be understood."""

    program: Program
    removed: dict[str, int]
    """Name of a group -> number of channels removed."""
    left: tuple[LeftAlone, ...]


class Unsound(Exception):
    """Removing these channels would change more than it should."""

    def __init__(self, detail: str, layers: tuple[str, ...]) -> None:
        self.layers = layers
        super().__init__(detail)


def find_sound_channels(program: Program, skip_layers: frozenset[str] = frozenset()) -> Channels:
    """Return only those channel groups of which one unit can be removed and the result proven right."""
    found = find_channels(program, skip_layers)
    removal = remove_channels(program, found, {group.name: np.array([0]) for group in found.groups})
    sound = [group for group in found.groups if group.name in removal.removed]
    return Channels(found.flow, sound, [*found.left, *removal.left])


def remove_channels(program: Program, channels: Channels, chosen: Chosen) -> Removal:
    """Return a smaller copy of the program without the chosen units, each group proven or left alone."""
    groups = {group.name: group for group in channels.groups}
    if not chosen:
        return Removal(program.copy(), {}, ())
    try:
        return Removal(_prove(program, channels, chosen), _count(groups, chosen), ())
    except Unsound:
        pass
    # Together they fail: find out which of them do alone.
    sound: Chosen = {}
    left = []
    for name, units in chosen.items():
        try:
            _prove(program, channels, {name: units})
        except Unsound as error:
            left.append(LeftAlone(error.layers, str(error)))
        else:
            sound[name] = units
    if not sound:
        return Removal(program.copy(), {}, tuple(left))
    return Removal(_prove(program, channels, sound), _count(groups, sound), tuple(left))


def _count(groups: dict[str, ChannelGroup], chosen: Chosen) -> dict[str, int]:
    return {name: len(units) * groups[name].unit_size for name, units in chosen.items()}


def _prove(program: Program, channels: Channels, chosen: Chosen) -> Program:
    layers = tuple(n for group in channels.groups if group.name in chosen for n in group.makers)
    inputs = program.example_inputs(allowed_batch(program, EXAMPLE_BATCH), seed=0)
    try:
        small = shrink(program, channels, chosen)
        actual = _call(small, inputs)
        if program.signature.batch_size is None:
            # A size that only happens to be right at one batch shows at another.
            _call(small, small.example_inputs(allowed_batch(small, OTHER_BATCH)))
    except (RuntimeError, AssertionError, IndexError, ValueError, TypeError) as error:
        # An impossible shape is reported in any of these ways.
        raise Unsound(f"the model does not run with fewer of its channels: {error}"[:500], layers) from error
    expected = _call(_ignore(program, channels, chosen), inputs)
    for output, want in zip(actual, expected, strict=True):
        if output.shape != want.shape:
            raise Unsound(f"an output would change from shape {tuple(want.shape)} to {tuple(output.shape)}", layers)
        if not torch.isfinite(output).all():
            raise Unsound("an output would not be finite", layers)
        difference, size = float((output - want).double().norm()), max(float(want.double().norm()), 1e-6)
        if difference > TOLERANCE * size:
            raise Unsound(
                f"an output would differ by {difference / size:.2g} of its norm from that of the model with "
                "these channels ignored",
                layers,
            )
    return small


def _call(program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = program.module.eval()(*inputs)
    return outputs


class Kept:
    """Which labels stay when some units are removed."""

    def __init__(self, flow: Flow, channels: Channels, chosen: Chosen) -> None:
        """`chosen` must not be empty."""
        gone = [group.roots[chosen[group.name]] for group in channels.groups if group.name in chosen]
        self._gone = np.zeros(len(flow.labels), dtype=bool)
        self._gone[np.concatenate(gone)] = True
        self._labels = flow.labels

    def mask(self, ids: Ids) -> np.ndarray:
        """Return for every position whether it stays."""
        return ~self._gone[self._labels.find(ids)]


def shrink(program: Program, channels: Channels, chosen: Chosen) -> Program:
    """Return a copy without the chosen units, unproven."""
    flow = channels.flow
    kept = Kept(flow, channels, chosen)
    small = program.copy()
    tensors = {**dict(small.module.named_parameters()), **dict(small.module.named_buffers())}
    replaced: dict[int, Tensor] = {}
    for name, axes in flow.tensors.items():
        tensor = tensors[name]
        value = tensor.detach()
        for axis, ids in enumerate(axes):
            if ids is not None and not (mask := kept.mask(ids)).all():
                value = value.index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
        if value.shape != tensor.shape:
            made = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            replaced[id(tensor)] = made
    for layer in small.module.modules():
        # A tensor that several layers share is replaced in all of them.
        for own in (layer._parameters, layer._buffers):
            for key, held in list(own.items()):
                if held is not None and id(held) in replaced:
                    setattr(layer, key, replaced[id(held)])
        _describe(layer)
    nodes = {node.name: node for node in small.module.graph.nodes}
    for node in flow.program.module.graph.nodes:
        if node.op == "call_function":
            _rewrite(flow, kept, node, nodes[node.name])
    small.module.graph.lint()
    small.module.recompile()
    return small


def _describe(layer: Any) -> None:
    """Let a layer's numbers say what its tensors are."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.conv._ConvNd):
        made, read = (1, 0) if layer.transposed else (0, 1)
        if layer.groups == layer.in_channels and layer.groups > 1:
            each = layer.out_channels // layer.groups
            layer.groups = layer.weight.shape[0] if layer.transposed else layer.weight.shape[0] // each
            layer.in_channels, layer.out_channels = layer.groups, layer.groups * each
        elif layer.transposed:
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        else:
            layer.in_channels, layer.out_channels = layer.weight.shape[read] * layer.groups, layer.weight.shape[made]
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        held = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
        layer.num_features = layer.num_features if held is None else len(held)
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        width = layer.num_channels // layer.num_groups
        layer.num_channels = len(layer.weight)
        layer.num_groups = layer.num_channels // width
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.RNNBase) and not getattr(layer, "proj_size", 0):
        weights: Any = layer
        layer.hidden_size, layer.input_size = weights.weight_hh_l0.shape[1], weights.weight_ih_l0.shape[1]


def _rewrite(flow: Flow, kept: Kept, old: fx.Node, new: fx.Node) -> None:
    """Change the sizes that a call holds as numbers."""
    name = operator_name(old)
    source = old.args[0] if old.args else None
    before = flow.axes(source)
    after: Any = flow.values.get(old)

    def count(ids: Ids | None) -> int | None:
        return None if ids is None or kept.mask(ids).all() else int(kept.mask(ids).sum())

    if name in ("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "unflatten") and after is not None:
        place = 2 if name == "unflatten" else 1
        sizes = list(new.args[place])  # type: ignore[arg-type]
        first = 0
        if name == "unflatten" and before is not None:
            first = arguments_of(old)["dim"] % len(before)
        for index, size in enumerate(sizes):
            ids = after[first + index]
            if isinstance(size, int) and size != -1 and (wanted := count(ids)) is not None:
                sizes[index] = wanted
            elif isinstance(size, fx.Node) and ids is None and _follows(flow, kept, _by_name(flow, size.name)):
                sizes[index] = flow.shape(old)[first + index]
        if sizes != list(new.args[place]):  # type: ignore[arg-type]
            new.args = (*new.args[:place], sizes, *new.args[place + 1 :])
        return
    if before is None or not isinstance(source, fx.Node):
        return
    given = (
        arguments_of(old) if name in ("slice", "pad", "constant_pad_nd") or "split" in name or "chunk" in name else {}
    )
    if name == "slice":
        ids = before[given["dim"]]
        if count(ids) is not None and ids is not None:
            bounds = slice_bounds(given, len(ids))
            assert bounds is not None
            low, high = (int(kept.mask(ids)[:bound].sum()) for bound in bounds[:2])
            new.args, new.kwargs = (new.args[0], given["dim"], low, high), {}
    elif name in ("pad", "constant_pad_nd"):
        amounts = list(given["pad"])
        for place in range(len(amounts) // 2):
            axis = len(before) - 1 - place
            low, high = amounts[2 * place : 2 * place + 2]
            if after[axis] is not None and (low or high):
                mask = kept.mask(after[axis])
                amounts[2 * place] = int(mask[:low].sum())
                amounts[2 * place + 1] = int(mask[len(mask) - high :].sum())
        new.args = (new.args[0], amounts, *new.args[2:])
    elif given and "sections" not in given:
        axis = given["dim"]
        if count(before[axis]) is not None:
            new.target = aten.split_with_sizes.default
            new.args = (new.args[0], [int(kept.mask(part[axis]).sum()) for part in after], axis)
            new.kwargs = {}


def _by_name(flow: Flow, name: str) -> fx.Node | None:
    return next((node for node in flow.program.module.graph.nodes if node.name == name), None)


def _follows(flow: Flow, kept: Kept, node: fx.Node | None) -> bool:
    """Tell whether a computed size comes from the size of an axis that becomes shorter."""
    if node is None or node.op != "call_function":
        return False
    if operator_name(node) == "sym_size":
        axes, axis = flow.axes(node.args[0]), node.args[1]
        ids = axes[axis] if axes is not None and isinstance(axis, int) else None
        return ids is not None and not kept.mask(ids).all()
    if operator_name(node):
        return False
    return any(_follows(flow, kept, each) for each in node.all_input_nodes)


def _ignore(program: Program, channels: Channels, chosen: Chosen) -> Program:
    """Return a copy of the original size in which nothing reads the chosen units."""
    flow = channels.flow
    kept = Kept(flow, channels, chosen)
    whole = program.copy()
    tensors = dict(whole.module.named_parameters())
    with torch.no_grad():
        for (name, axis), roles in flow.roles.items():
            ids = flow.tensors[name][axis]
            if "in" in roles and ids is not None and name in tensors:
                tensors[name].index_fill_(axis, torch.from_numpy(np.flatnonzero(~kept.mask(ids))), 0.0)
    nodes = {node.name: node for node in whole.module.graph.nodes}
    for number, reading in enumerate(flow.readings):
        mask = kept.mask(reading.labels)
        if mask.all():
            continue
        node, indices = nodes[reading.node.name], torch.from_numpy(np.flatnonzero(mask))
        if node.op == "call_module":
            layer = whole.module.get_submodule(str(node.target))
            if not isinstance(layer, _KeptNorm):
                _replace(whole.module, str(node.target), _KeptNorm(layer, indices))
            continue
        whole.module.register_buffer(f"kept_{number}", indices)
        source = node.args[reading.argument]
        with whole.module.graph.inserting_before(node):
            index = whole.module.graph.get_attr(f"kept_{number}")
            chosen_ones = whole.module.graph.call_function(aten.index_select.default, (source, reading.axis, index))
        args = list(node.args)
        args[reading.argument] = chosen_ones
        node.args = tuple(args)
    whole.module.recompile()
    return whole


def _replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


class _KeptNorm(nn.Module):
    """A norm over the kept positions of the last axis; the others become zero."""

    def __init__(self, layer: Any, indices: Tensor) -> None:
        super().__init__()
        self.layer, self.indices = layer, indices

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor in its whole width."""
        part = x.index_select(-1, self.indices)
        weight = None if self.layer.weight is None else self.layer.weight[self.indices]
        shape = [len(self.indices)]
        if isinstance(self.layer, nn.RMSNorm):
            normed = nn.functional.rms_norm(part, shape, weight, self.layer.eps)
        else:
            bias = None if self.layer.bias is None else self.layer.bias[self.indices]
            normed = nn.functional.layer_norm(part, shape, weight, bias, self.layer.eps)
        return torch.zeros_like(x).index_copy(-1, self.indices, normed)
