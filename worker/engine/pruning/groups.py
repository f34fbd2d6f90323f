"""Groups: classes of channels that lie at the same places of the same parameters, and compete with each other."""

from dataclasses import dataclass
from math import gcd, lcm
from typing import Literal

import numpy as np
from torch import nn

from worker.engine.programs.program import Program
from worker.engine.pruning.flow import Flow
from worker.engine.pruning.follow import follow
from worker.engine.pruning.labels import Ids

Structure = Literal["channels", "hidden_units", "heads", "width"]
MOST_MAKERS_OF_HIDDEN_UNITS = 2
"""A gated layer has two; what more layers add to, and a norm reads, is the stream of a transformer."""
MAKERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)


@dataclass(frozen=True)
class Place:
    """An axis of a parameter that a group's units lie on: `units[k]` owns the position `positions[k]`."""

    parameter: str
    axis: int
    roles: frozenset[str]
    positions: Ids
    units: Ids


@dataclass(frozen=True)
class ChannelGroup:
    """Units of which any can be removed. A unit is one channel, one head, or what else must go together."""

    name: str
    """Of the first layer that makes its channels, with a number where a layer makes those of several groups."""
    structure: Structure
    roots: Ids
    """The class of labels of every unit."""
    unit_size: int
    """Channels a unit has where it has fewest: the width of a head, or 1."""
    multiple: tuple[int, ...]
    """Positions a unit takes on each axis that is made, scaled or read: rounding looks at all of them."""
    places: tuple[Place, ...]
    makers: tuple[str, ...]
    """The layers whose outputs become narrower."""

    @property
    def num_units(self) -> int:
        """Return how many units there are."""
        return len(self.roots)

    @property
    def num_channels(self) -> int:
        """Return how many channels there are."""
        return len(self.roots) * self.unit_size

    def units_per_step(self, round_to: int) -> int:
        """Return the smallest number of units that is a multiple of `round_to` on every axis."""
        return lcm(*(round_to // gcd(size, round_to) for size in self.multiple))


@dataclass(frozen=True)
class LeftAlone:
    """Layers that keep their width, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass
class Channels:
    """All channel groups of a program."""

    flow: Flow
    groups: list[ChannelGroup]
    left: list[LeftAlone]


def find_channels(program: Program, skip_layers: frozenset[str] = frozenset()) -> Channels:
    """Return the groups of the program's module, in the order of its parameters."""
    flow = follow(program, skip_layers)
    labels = flow.labels
    layers = dict(program.module.named_modules())
    axes = [
        (name, axis, labels.find(ids))
        for name, per_axis in flow.tensors.items()
        for axis, ids in enumerate(per_axis)
        if ids is not None and (name, axis) in flow.roles
    ]
    where: dict[int, list[tuple[int, int]]] = {}
    for index, (_, _, roots) in enumerate(axes):
        for root, count in zip(*(part.tolist() for part in np.unique(roots, return_counts=True)), strict=True):
            where.setdefault(root, []).append((index, count))
    read = {root for each in flow.readings for root in np.unique(labels.find(each.labels)).tolist()}
    profiles: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root in sorted(where):
        profiles.setdefault(tuple(where[root]), []).append(root)
    groups: list[ChannelGroup] = []
    left: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    for profile, members in profiles.items():
        roles = {role for index, _ in profile for role in flow.roles[axes[index][:2]]}
        makers = tuple(
            dict.fromkeys(
                axes[index][0].rpartition(".")[0] or axes[index][0]
                for index, _ in profile
                if flow.roles[axes[index][:2]] & {"out", "free"} or _is_depthwise(flow, layers, *axes[index][:2])
            )
        )
        if not makers:
            continue
        free, reasons = [], []
        for root in members:
            reason = labels.reason(root)
            if reason is None and "in" not in roles and root not in read:
                reason = "no layer that can become narrower reads its channels"
            if reason is None:
                free.append(root)
            else:
                reasons.append(reason)
        for reason in dict.fromkeys(reasons):
            # A free parameter alone, such as a table of masks, is no layer.
            left.setdefault(reason, []).extend(n for n in makers if "out" in roles or _is_maker(layers.get(n)))
        if not free:
            continue
        if len(free) < 2:
            left.setdefault("nothing would be left of its channels", []).extend(makers)
            continue
        groups.append(_form(flow, profile, axes, np.array(free), makers, layers, seen))
    return Channels(flow, groups, [LeftAlone(tuple(dict.fromkeys(n)), reason) for reason, n in left.items() if n])


def _is_depthwise(flow: Flow, layers: dict[str, nn.Module], name: str, axis: int) -> bool:
    layer = layers.get(name.rpartition(".")[0])
    return axis == 0 and isinstance(layer, nn.modules.conv._ConvNd) and "scale" in flow.roles[(name, axis)]


def _is_maker(layer: nn.Module | None) -> bool:
    return isinstance(layer, MAKERS)


def _form(
    flow: Flow,
    profile: tuple[tuple[int, int], ...],
    axes: list[tuple[str, int, Ids]],
    roots: Ids,
    makers: tuple[str, ...],
    layers: dict[str, nn.Module],
    seen: dict[str, int],
) -> ChannelGroup:
    places = []
    for index, _ in profile:
        name, axis, labels = axes[index]
        units: Ids = np.searchsorted(roots, labels).astype(np.int64)
        mine = (units < len(roots)) & (roots[np.minimum(units, len(roots) - 1)] == labels)
        positions = np.flatnonzero(mine)
        places.append(Place(name, axis, frozenset(flow.roles[(name, axis)]), positions, units[positions]))
    tags = {tag for root in roots.tolist() for tag in flow.labels.tags(root)}
    kinds = [layers[maker] for maker in makers if maker in layers]
    structure: Structure
    if "heads" in tags:
        structure = "heads"
    elif tags & {"embedding", "sum"} or ("norm" in tags and len(makers) > MOST_MAKERS_OF_HIDDEN_UNITS):
        structure = "width"
    elif any(isinstance(layer, nn.modules.conv._ConvNd) for layer in kinds):
        structure = "channels"
    else:
        structure = "hidden_units"
    number = seen[makers[0]] = seen.get(makers[0], 0) + 1
    return ChannelGroup(
        name=makers[0] if number == 1 else f"{makers[0]}#{number}",
        structure=structure,
        roots=roots,
        unit_size=min(count for _, count in profile),
        multiple=tuple(sorted({count for _, count in profile})),
        places=tuple(places),
        makers=makers,
    )
