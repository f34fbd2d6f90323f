"""Removing chosen channels from a program, with a proof that nothing else changed.

The proof: in a copy of the original, every layer that reads a removed channel gets zero weights for it. That copy
computes exactly what the smaller model must compute. Where the two differ on example inputs, the group was not
understood, and it is left alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.programs.program import Program
from worker.engine.pruning.groups import CONVOLUTIONS, ChannelGroup, Channels, LeftAlone, find_channels, quiet

TOLERANCE = 1e-3
"""Largest error of the smaller model's outputs, as a share of their norm: float32 noise of sums in another order."""


@dataclass(frozen=True)
class Removal:
    """A program with channels removed, and the groups that turned out not to be understood."""

    program: Program
    removed: dict[str, int]
    """Root layer of a group -> number of channels removed."""
    left: tuple[LeftAlone, ...]


def find_sound_channels(
    program: Program, inputs: tuple[Tensor, ...], skip_layers: frozenset[str] = frozenset()
) -> Channels:
    """Return only those channel groups of which one unit can be removed and the result proven right."""
    found = find_channels(program, inputs, skip_layers)
    chosen = {g.root_name: g.units[0] for g in found.groups if len(g.units) > 1}
    tiny = [g for g in found.groups if len(g.units) < 2]
    left = [*found.left, *(LeftAlone(g.makers, "nothing would be left of its channels") for g in tiny)]
    if chosen:
        left += remove_channels(program, chosen, inputs, skip_layers).left
    unsound = {name for each in left for name in each.layers}
    sound = [group for group in found.groups if group.root_name not in unsound]
    return Channels(found.graph, sound, left)


def remove_channels(
    program: Program,
    chosen: dict[str, np.ndarray],
    inputs: tuple[Tensor, ...],
    skip_layers: frozenset[str] = frozenset(),
) -> Removal:
    """Return a smaller copy of the program. `chosen` maps the root layer of a group to the channels to remove."""
    try:
        return Removal(_remove(program, chosen, inputs, skip_layers), _count(chosen), ())
    except Unsound:
        pass
    # Together they fail: find out which of them do alone.
    sound: dict[str, np.ndarray] = {}
    left = []
    for root, channels in chosen.items():
        try:
            _remove(program, {root: channels}, inputs, skip_layers)
        except Unsound as error:
            left.append(LeftAlone(error.layers, str(error)))
        else:
            sound[root] = channels
    if not sound:
        return Removal(program.copy(), {}, tuple(left))
    return Removal(_remove(program, sound, inputs, skip_layers), _count(sound), tuple(left))


class Unsound(Exception):
    """Removing these channels would change more than it should."""

    def __init__(self, detail: str, layers: tuple[str, ...]) -> None:
        self.layers = layers
        super().__init__(detail)


def _count(chosen: dict[str, np.ndarray]) -> dict[str, int]:
    return {root: len(channels) for root, channels in chosen.items()}


def _remove(
    program: Program,
    chosen: dict[str, np.ndarray],
    inputs: tuple[Tensor, ...],
    skip_layers: frozenset[str],
) -> Program:
    small, reference = program.copy(), program.copy()
    channels = find_channels(small, inputs, skip_layers)
    groups = [group for group in channels.groups if group.root_name in chosen]
    layers = tuple(name for group in groups for name in group.makers)
    for group in groups:
        _silence(reference.module, group, chosen[group.root_name])
    try:
        with quiet():
            norms = {
                layer: layer.num_channels // layer.num_groups
                for layer in small.module.modules()
                if isinstance(layer, nn.GroupNorm)
            }
            for group in groups:
                channels.slots(group, chosen[group.root_name]).prune(record_history=False)
            for norm, width in norms.items():
                # torch-pruning keeps the number of groups; whole groups were removed, so their width stays instead.
                norm.num_groups = norm.num_channels // width
        actual = _call(small, inputs)
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        # torch-pruning and torch report an impossible shape in any of these ways.
        raise Unsound(f"the model does not run with fewer of its channels: {error}"[:500], layers) from error
    expected = _call(reference, inputs)
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


def _silence(module: nn.Module, group: ChannelGroup, channels: np.ndarray) -> None:
    """Zero the weights with which layers read the given channels of a group."""
    with torch.no_grad():
        for slot in group.slots:
            if not slot.is_input:
                continue
            layer = module.get_submodule(slot.name)
            read = torch.from_numpy(slot.channels[np.isin(slot.roots, channels)])
            weight = layer.weight
            assert isinstance(weight, Tensor)
            if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
                # Input channel c belongs to group c // width, which makes its own share of the outputs.
                width = layer.in_channels // layer.groups
                outputs = layer.out_channels // layer.groups
                for channel in read.tolist():
                    part = channel // width
                    weight[part * outputs : (part + 1) * outputs, channel % width] = 0
            elif isinstance(layer, CONVOLUTIONS) and layer.transposed:
                weight[read] = 0
            else:
                weight[:, read] = 0
