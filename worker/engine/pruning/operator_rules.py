"""What every operator of a graph does to the positions of its axes."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from worker.engine.programs.layers import arguments_of
from worker.engine.pruning.flow import Axes, Flow, Reading
from worker.engine.pruning.labels import Ids
from worker.engine.pruning.operator_families import (
    ALONG_AN_AXIS,
    CREATIONS,
    ELEMENTWISE,
    PERMUTATIONS,
    POOLS,
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    SPLITS,
)
from worker.engine.pruning.product_rules import pass_attention, pass_product

Rule = Callable[[Flow, fx.Node, dict[str, Any]], Any]


def operator_name(node: fx.Node) -> str:
    """Return the name of an aten operator without overload and in-place mark, or "" for anything else."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.removeprefix("aten::")
    return name if name.startswith("_") else name.rstrip("_")


def pass_operator(flow: Flow, node: fx.Node) -> Any:
    """Return the labels of what the operator makes."""
    shape = flow.shapes.get(node)
    if node.target is operator.getitem:
        source, index = node.args
        value = flow.values.get(source) if isinstance(source, fx.Node) else None
        return value[index] if isinstance(value, list) and isinstance(index, int) else None
    if shape is None:
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        rule = _find_rule(node)
        result = rule(flow, node, arguments_of(node)) if rule else None
        if result is not None:
            return result
    where = operator_name(node) or getattr(node.target, "__name__", str(node.target))
    for source in node.all_input_nodes:
        flow.freeze(flow.values.get(source), f"its channels reach {where}, which keeps its width")
    return [None] * len(shape) if isinstance(shape, tuple) else [[None] * len(part or ()) for part in shape]


def _find_rule(node: fx.Node) -> Rule | None:
    name = operator_name(node)
    for names, rule in _RULES:
        if name in names:
            return rule
    assert isinstance(node.target, torch._ops.OpOverload)
    return _elementwise if torch.Tag.pointwise in node.target.tags else None


SUMS = frozenset({"add", "add_", "sub", "sub_"})
"""Where a layer's output joins a stream that others feed too."""


def _positive(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _elementwise(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes | None:
    shape = flow.shape(node)
    result: Axes = []
    sources = [source for source in node.all_input_nodes if flow.axes(source) is not None]
    for axis in range(-len(shape), 0):
        parts = []
        for source in sources:
            axes, sizes = flow.axes(source), flow.shape(source)
            if axes is not None and len(sizes) >= -axis:
                parts.append((axes[axis], sizes[axis]))
        joins = operator_name(node) in SUMS and _have_different_makers(flow, sources, [ids for ids, _ in parts])
        united = flow.unite_axes(parts, node.name)
        if joins and united is not None:
            flow.labels.tag(united, "sum")
        result.append(united)
    return result


def _have_different_makers(flow: Flow, sources: list[fx.Node], parts: list[Ids | None]) -> bool:
    """Whether two computed values meet here that did not belong together: x + f(x), not x + x ** 3 or x + bias."""
    if len(parts) != 2 or any(source.op == "get_attr" for source in sources):
        return False
    left, right = parts
    if left is None or right is None or len(left) != len(right):
        return False
    return not np.array_equal(flow.labels.find(left), flow.labels.find(right))


def _create(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes:
    return [None] * len(flow.shape(node))


def _reshape(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes | None:
    source = node.args[0]
    axes = flow.axes(source)
    if axes is None or not isinstance(source, fx.Node):
        return None
    return flow.reshape(node, axes, flow.shape(source), flow.shape(node))


def _permute(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes | None:
    source = node.args[0]
    axes = flow.axes(source)
    if axes is None:
        return None
    # The operator itself tells where its axes go.
    marked = torch.empty(tuple(range(2, 2 + len(axes))), device="meta")
    assert not isinstance(node.target, str)
    moved = node.target(marked, *node.args[1:], **node.kwargs)
    return [axes[size - 2] for size in moved.shape]


def _expand(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes | None:
    source = node.args[0]
    axes, shape = flow.axes(source), flow.shape(node)
    if axes is None or not isinstance(source, fx.Node):
        return None
    return [None] * (len(shape) - len(axes)) + list(axes)


def _repeat_interleave(flow: Flow, _node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = flow.axes(given["self"])
    if axes is None or not isinstance(given.get("repeats"), int) or given.get("dim") is None:
        return None
    axis = _positive(given["dim"], len(axes))
    ids = axes[axis]
    return [*axes[:axis], None if ids is None else np.repeat(ids, given["repeats"]), *axes[axis + 1 :]]


def _concatenate(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    parts = given["tensors"]
    known = [flow.axes(part) for part in parts]
    if any(axes is None for axes in known):
        return None
    rank = len(flow.shape(node))
    axis = _positive(given["dim"], rank)
    result: Axes = []
    for each in range(rank):
        columns = [(axes[each], flow.shape(part)[each]) for part, axes in zip(parts, known, strict=True) if axes]
        if each != axis:
            result.append(flow.unite_axes(columns, node.name))
        elif all(ids is None for ids, _ in columns):
            result.append(None)
        else:
            pieces = []
            for ids, size in columns:
                if ids is None:
                    ids = flow.labels.new(size)
                    flow.labels.freeze(ids, f"its channels are joined with others at {node.name}")
                pieces.append(ids)
            result.append(np.concatenate(pieces))
    return result


def _stack(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    parts = given["tensors"]
    known = [flow.axes(part) for part in parts]
    if any(axes is None for axes in known):
        return None
    sizes = flow.shape(parts[0])
    result: Axes = [
        flow.unite_axes([(axes[each], sizes[each]) for axes in known if axes is not None], node.name)
        for each in range(len(sizes))
    ]
    result.insert(_positive(given["dim"], len(sizes) + 1), None)
    return result


def _split(flow: Flow, node: fx.Node, given: dict[str, Any]) -> list[Axes] | None:
    axes = flow.axes(node.args[0])
    if axes is None:
        return None
    axis = _positive(given["dim"], len(axes))
    ids, start, parts = axes[axis], 0, []
    for shape in flow.shapes[node]:
        part = None if ids is None else ids[start : start + shape[axis]]
        parts.append([*axes[:axis], part, *axes[axis + 1 :]])
        start += shape[axis]
    return parts


def _unbind(flow: Flow, node: fx.Node, given: dict[str, Any]) -> list[Axes] | None:
    axes = flow.axes(node.args[0])
    if axes is None:
        return None
    axis = _positive(given["dim"], len(axes))
    flow.freeze(axes[axis], f"its channels are taken one by one at {node.name}")
    return [[*axes[:axis], *axes[axis + 1 :]] for _ in flow.shapes[node]]


def _select(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = flow.axes(node.args[0])
    if axes is None:
        return None
    axis = _positive(given["dim"], len(axes))
    flow.freeze(axes[axis], f"its channels are taken one by one at {node.name}")
    return [*axes[:axis], *axes[axis + 1 :]]


def slice_bounds(given: dict[str, Any], size: int) -> tuple[int, int, int] | None:
    """Return (start, end, step) of a slice of an axis, or None where they are computed."""
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    if any(isinstance(value, fx.Node) for value in (start, end, step)):
        return None
    return slice(start, end, step).indices(size)


def _slice(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = flow.axes(node.args[0])
    if axes is None:
        return None
    axis = _positive(given["dim"], len(axes))
    ids = axes[axis]
    if ids is None:
        return list(axes)
    bounds = slice_bounds(given, len(ids))
    if bounds is None or bounds[2] != 1:
        return None
    return [*axes[:axis], ids[slice(*bounds)], *axes[axis + 1 :]]


def _pad(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes, amounts = flow.axes(node.args[0]), given["pad"]
    if axes is None:
        return None
    result = list(axes)
    for place in range(len(amounts) // 2):
        axis, (low, high) = len(axes) - 1 - place, amounts[2 * place : 2 * place + 2]
        ids = axes[axis]
        if ids is None or (low == 0 and high == 0):
            continue
        if not (isinstance(low, int) and isinstance(high, int)) or min(low, high) < 0:
            return None
        if given.get("mode", "constant") != "constant":
            return None
        # The channels that padding adds can go like any other; the amounts are written anew then.
        result[axis] = np.concatenate([flow.labels.new(low), ids, flow.labels.new(high)])
    return result


def _pool(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Any:
    axes = flow.axes(node.args[0])
    shape = flow.shapes[node]
    if axes is None:
        return None
    rank = len(axes)
    spatial = int(operator_name(node).split("d_")[0].rstrip("d")[-1:] or 2) if rank < 3 else rank - 2
    if rank != spatial + 2:
        return None
    for ids in axes[2:]:
        flow.freeze(ids, f"its channels are pooled at {node.name}")
    passed: Axes = [axes[0], axes[1], *[None] * spatial]
    return passed if isinstance(shape, tuple) else [list(passed) for _ in shape]


def _reduce(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Any:
    axes, dims = flow.axes(node.args[0]), given.get("dim")
    if axes is None or dims is None:
        return None
    rank = len(axes)
    reduced = {_positive(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims)} or set(range(rank))
    for axis in reduced:
        ids = axes[axis]
        if ids is not None:
            flow.readings.append(Reading(node, 0, axis, ids))
            flow.labels.tag(ids, "norm")
    keep = given.get("keepdim", False)
    passed: Axes = [None if axis in reduced else ids for axis, ids in enumerate(axes) if keep or axis not in reduced]
    shape = flow.shapes[node]
    return passed if isinstance(shape, tuple) else [list(passed) for _ in shape]


def _along(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes = flow.axes(node.args[0])
    dims = given.get("dim", given.get("dims"))
    if axes is None or dims is None:
        return None
    for dim in [dims] if isinstance(dims, int) else dims:
        flow.freeze(axes[dim], f"its channels reach {operator_name(node)}, which keeps its width")
    return list(axes)


def _triangle(flow: Flow, node: fx.Node, _given: dict[str, Any]) -> Axes | None:
    axes = flow.axes(node.args[0])
    if axes is None:
        return None
    for ids in axes[-2:]:
        flow.freeze(ids, f"its channels reach {operator_name(node)}, which keeps its width")
    return list(axes)


def _index(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    axes, indices = flow.axes(node.args[0]), given["indices"]
    used = [place for place, index in enumerate(indices) if index is not None]
    if axes is None or len(used) != 1:
        return None
    place = used[0]
    flow.freeze(axes[place], f"its channels are taken one by one at {node.name}")
    index = flow.axes(indices[place])
    for ids in index or []:
        flow.freeze(ids, f"its channels are numbers of positions at {node.name}")
    return [*axes[:place], *[None] * len(index or []), *axes[place + 1 :]]


def _attention(flow: Flow, node: fx.Node, given: dict[str, Any]) -> Axes | None:
    return pass_attention(flow, node, [given["query"], given["key"], given["value"], given.get("attn_mask")])


_RULES: tuple[tuple[frozenset[str], Rule], ...] = (
    (ELEMENTWISE, _elementwise),
    (CREATIONS, _create),
    (RESHAPES, _reshape),
    (PERMUTATIONS, _permute),
    (frozenset({"expand", "broadcast_to"}), _expand),
    (frozenset({"repeat_interleave"}), _repeat_interleave),
    (frozenset({"cat", "concat"}), _concatenate),
    (frozenset({"stack"}), _stack),
    (SPLITS, _split),
    (frozenset({"unbind"}), _unbind),
    (frozenset({"select"}), _select),
    (frozenset({"slice"}), _slice),
    (frozenset({"pad", "constant_pad_nd"}), _pad),
    (POOLS, _pool),
    (REDUCTIONS, _reduce),
    (ALONG_AN_AXIS, _along),
    (frozenset({"tril", "triu"}), _triangle),
    (frozenset({"index"}), _index),
    (PRODUCTS, pass_product),
    (frozenset({"scaled_dot_product_attention"}), _attention),
)
"""Names of operators -> their rule. An operator that torch calls pointwise needs no entry."""
