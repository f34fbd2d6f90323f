"""What changes while a graph is computed: tensors that operators write into, and layers that count what they see.

A value that another stage holds too is a copy there. So what shares memory with a written tensor, and all calls of a
layer with running statistics, belong into one stage.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True)
class Write:
    """An operator that writes into memory."""

    node: fx.Node
    target: fx.Node
    """The argument that it writes into."""
    family: list[fx.Node]
    """All nodes that share the memory; the first is the one that made it."""

    @property
    def names(self) -> set[fx.Node]:
        """Return the nodes through which what was written is seen later, the written one and the result aside."""
        return {each for each in self.family if each not in (self.node, self.target)}


def find_changes(nodes: Iterable[fx.Node]) -> list[Write]:
    """Return the writes among the nodes of a graph."""
    families: dict[fx.Node, list[fx.Node]] = {}
    changes = []
    for node in nodes:
        source, writes = _shares_memory_with(node)
        family = families[node] = [] if source is None else families[source]
        family.append(node)
        if source is not None and writes:
            changes.append(Write(node, source, family))
    return changes


def find_tainted(changes: Iterable[Write], free: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that are not free, though their arguments are: something is written into them that is not.

    What stands in the graph as an input or a constant stays free; `keep_together` looks after it.
    """
    return {
        each
        for write in changes
        if write.node not in free
        for each in write.family
        if each in free and each.op not in ("placeholder", "get_attr")
    }


def keep_together(module: fx.GraphModule, nodes: Sequence[fx.Node], free: set[fx.Node]) -> list[tuple[int, int]]:
    """Return pairs of places in a graph between which it must not be cut."""
    place = {node: index for index, node in enumerate(nodes)}
    pairs = []
    for write in find_changes(nodes):
        if write.node in free:
            continue
        here, first = place[write.node], write.family[0]
        later = {each for each in write.names if any(place[user] > here for user in each.users)}
        if first.op in ("placeholder", "get_attr"):
            pairs.append((here, max(place[user] for each in write.family for user in each.users)))
        if later:
            views = (later | {write.target}) - {first}
            pairs += [(place[each], here) for each in views if place[each] < here]
    calls: dict[str, list[int]] = {}
    for node in nodes:
        if node.op == "call_module" and _counts(module.get_submodule(str(node.target))):
            calls.setdefault(str(node.target), []).append(place[node])
    return pairs + [(places[0], places[-1]) for places in calls.values()]


def _shares_memory_with(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """Return the argument whose memory a node's value is or may be, and whether the node writes into it."""
    if node.op != "call_function":
        return None, False
    if node.target is operator.getitem:
        return _node(node.args[0]), False
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, False
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            return _node(given), argument.alias_info.is_write
    return None, False


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _counts(layer: torch.nn.Module) -> bool:
    return isinstance(layer, _NormBase) and layer.track_running_stats
