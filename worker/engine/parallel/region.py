"""Where in a graph the channels of a group are: between the layers that make them and those that read them.

There every rank computes with its own channels. What comes in whole from outside, be it an activation or a parameter
without channels of its own, gets a share of its gradient on each rank; the shares must be summed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from worker.engine.programs.program import Program
from worker.engine.pruning.flow import Flow
from worker.engine.pruning.groups import ChannelGroup


@dataclass(frozen=True)
class Region:
    """The nodes of a graph whose values hold channels of a group."""

    nodes: tuple[fx.Node, ...]
    entries: tuple[tuple[fx.Node, fx.Node], ...]
    """(node, argument that it takes whole): layers that make channels, and whatever else meets them."""
    layers: tuple[str, ...]
    """Layers inside whose parameters are whole on every rank."""


def find_region(program: Program, flow: Flow, group: ChannelGroup) -> Region | None:
    """Return where a group is; None where ranks with a part of its channels could not compute what all would.

    That is where something looks at several channels at once (a mean, a norm), other than the layers that read them,
    or where a layer inside is called outside too.
    """
    readers = {place.parameter.rpartition(".")[0] for place in group.places if "in" in place.roles}
    roots = set(group.roots.tolist())
    if any(_holds(flow, each.labels, roots) for each in flow.readings):
        return None
    inside = [node for node in program.module.graph.nodes if _holds(flow, flow.values.get(node), roots)]
    members = set(inside)
    calls: dict[str, bool] = {}
    entries, layers = [], dict[str, None]()
    for node in program.module.graph.nodes:
        meets = any(each in members for each in node.all_input_nodes)
        if node.op == "call_module":
            layer = str(node.target)
            if calls.setdefault(layer, meets or node in members) != (meets or node in members):
                return None
            if meets and node not in members and layer not in readers:
                return None
            if meets and layer not in readers and _own_parameters(program, layer):
                if not _are_alone(program, layer):
                    return None
                layers[layer] = None
        elif meets and node not in members and isinstance(flow.shapes.get(node), tuple | list):
            return None
        if node in members and node.op in ("call_module", "call_function"):
            entries += [
                (node, each)
                for each in node.all_input_nodes
                if each not in members and isinstance(flow.shapes.get(each), tuple)
            ]
    return Region(tuple(inside), tuple(entries), tuple(layers))


def _holds(flow: Flow, value: Any, roots: set[int]) -> bool:
    if isinstance(value, np.ndarray):
        return not roots.isdisjoint(flow.labels.find(value).tolist())
    return isinstance(value, list) and any(_holds(flow, each, roots) for each in value)


def _own_parameters(program: Program, layer: str) -> set[str]:
    return {f"{layer}.{name}" for name, _ in program.module.get_submodule(layer).named_parameters()}


def _are_alone(program: Program, layer: str) -> bool:
    """Whether no other layer has the parameters of this one."""
    own = {id(each) for each in program.module.get_submodule(layer).parameters()}
    names = {name for name, each in program.module.named_parameters(remove_duplicate=False) if id(each) in own}
    return names == _own_parameters(program, layer)
