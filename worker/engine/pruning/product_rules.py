"""What matrix products and attention do to the positions of their axes."""

from typing import Any

import numpy as np
from torch import fx

from worker.engine.pruning.flow import Axes, Flow, Reading


def pass_product(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes | None:
    """Return the labels behind a matrix product, with an added first argument or without."""
    sources = list(node.args)
    left, right = sources[-2:]
    one, other = flow.axes(left), flow.axes(right)
    if one is None or other is None or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if len(one) < 2 or len(other) < 2:
        return None
    shape, sizes = flow.shape(left), flow.shape(right)
    lead: Axes = []
    for axis in range(-max(len(one), len(other)), -2):
        parts = [(a[axis], s[axis]) for a, s in ((one, shape), (other, sizes)) if len(a) >= -axis]
        ids = flow.unite_axes(parts, node.name)
        if ids is not None:
            flow.labels.tag(ids, "heads")
        lead.append(ids)
    inner = flow.unite_axes([(one[-1], shape[-1]), (other[-2], sizes[-2])], node.name)
    if inner is not None:
        position = sources.index(left)
        flow.readings.append(Reading(node, position, len(one) - 1, inner))
        flow.readings.append(Reading(node, position + 1, len(other) - 2, inner))
    _name_role(flow, right, len(other) - 2, "in")
    _name_role(flow, right, len(other) - 1, "out")
    result: Axes = [*lead, one[-2], other[-1]]
    if len(sources) == 3:
        bias = flow.axes(sources[0])
        assert isinstance(sources[0], fx.Node)
        offset = flow.shape(sources[0])
        if bias is None:
            return None
        whole = flow.shape(node)
        _name_role(flow, sources[0], 0, "out")
        for axis in range(-len(bias), 0):
            result[axis] = flow.unite_axes([(result[axis], whole[axis]), (bias[axis], offset[axis])], node.name)
    return result


def _name_role(flow: Flow, node: fx.Node, axis: int, role: str) -> None:
    """Say what a product does with a free parameter: it is then a layer like any other."""
    if node.op == "get_attr" and (name := flow.free.get(node)) is not None and (name, axis) in flow.roles:
        flow.roles[(name, axis)] = (flow.roles[(name, axis)] - {"free"}) | {role}


def pass_attention(flow: Flow, node: fx.Node, sources: list[Any]) -> Axes | None:
    """Return the labels behind attention over (query, key, value, mask). With grouped queries, groups go whole."""
    query, key, value = (flow.axes(source) for source in sources[:3])
    if query is None or key is None or value is None or len({len(query), len(key), len(value)}) != 1:
        return None
    shapes = [flow.shape(source) for source in sources[:3]]
    rank, where = len(query), node.name
    for axes in (query, key):
        flow.freeze(axes[-1], f"the width of a head scales attention at {where}")
    for axes in (query, key, value):
        flow.freeze(axes[-2], f"its channels are positions at {where}")
    result: Axes = []
    for axis in range(rank - 2):
        parts = []
        for axes, shape in zip((query, key, value), shapes, strict=True):
            ids, size = axes[axis], shape[axis]
            if axis == rank - 3 and 1 < size < shapes[0][axis]:
                ids, size = (None if ids is None else np.repeat(ids, shapes[0][axis] // size)), shapes[0][axis]
            parts.append((ids, size))
        ids = flow.unite_axes(parts, where)
        if ids is not None:
            flow.labels.tag(ids, "heads")
        result.append(ids)
    mask = sources[3] if len(sources) > 3 else None
    if isinstance(mask, fx.Node):
        masked, shape = flow.axes(mask) or [], flow.shape(mask)
        for axis in range(-len(masked), 0):
            if axis >= -2:
                flow.freeze(masked[axis], f"its channels are positions at {where}")
            else:
                flow.unite_axes([(result[axis + 2], shapes[0][axis]), (masked[axis], shape[axis])], where)
    return [*result, None, value[-1]]
