"""Sizes written as numbers in reshape, expand and split calls, made to follow their input.

A graph records `view(x, [8, 49, 384])` where the code said `x.flatten(2)` or `x.view(b, n, heads * width)`. After
channels are removed 384 is wrong. Where a size can be derived from the input's own sizes, it is.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_Value = Callable[[Any], Any]


def free_sizes(graph: fx.Graph, node: fx.Node, value: _Value) -> fx.Node | None:
    """Return a new call with derived sizes in place of `node`, or None where nothing is to be changed.

    `value` maps an old node or constant to the new graph's.
    """
    source = node.args[0] if node.args else None
    known = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(known, Tensor):
        return None
    shape = list(known.shape)
    if node.target in _RESHAPES and len(node.args) == 2:
        result = node.meta.get("val")
        if isinstance(result, Tensor):
            return _reshape(graph, node, value, shape, list(result.shape))
    if node.target is aten.expand.default:
        return _expand(graph, node, value, shape)
    if node.target is aten.split.Tensor and isinstance(node.args[1], int):
        return _split(graph, node, value, shape, node.args[1])
    if node.target is aten.split_with_sizes.default and len({*node.args[1]}) == 1:  # type: ignore[misc]
        return _split(graph, node, value, shape, node.args[1][0])  # type: ignore[index]
    return None


def _expand(graph: fx.Graph, node: fx.Node, value: _Value, shape: list[Any]) -> fx.Node:
    wanted = list(node.args[1])  # type: ignore[arg-type]
    lead = len(wanted) - len(shape)
    sizes = [
        # -1 keeps a size. An axis of 1 is the one that is being expanded.
        -1 if index >= lead and isinstance(size, int) and size == shape[index - lead] != 1 else value(size)
        for index, size in enumerate(wanted)
    ]
    return graph.call_function(aten.expand.default, (value(node.args[0]), sizes), dict(node.kwargs))


def _split(graph: fx.Graph, node: fx.Node, value: _Value, shape: list[Any], part: Any) -> fx.Node | None:
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if not isinstance(axis, int):
        return None
    size = shape[axis]
    if not isinstance(size, int) or not isinstance(part, int) or part <= 0 or size % part or size == part:
        return None
    return graph.call_function(aten.chunk.default, (value(node.args[0]), size // part, axis))


def _reshape(graph: fx.Graph, node: fx.Node, value: _Value, shape: list[Any], result: list[Any]) -> fx.Node | None:
    groups = _align(shape, result)
    if groups is None:
        return None
    source = value(node.args[0])
    wanted = list(node.args[1])  # type: ignore[arg-type]
    sizes: list[Any] = [value(size) for size in wanted]
    open_axis: int | None = None
    derived: list[tuple[int, list[int]]] = []
    for inputs, outputs in groups:
        if len(outputs) == 1 and inputs:
            if isinstance(result[outputs[0]], int):
                derived.append((outputs[0], inputs))
        elif len(outputs) > 1 and inputs and all(isinstance(result[axis], int) for axis in outputs):
            axis = _free_axis(shape, result, inputs, outputs)
            rest = [other for other in outputs if other != axis]
            # One size of a split can be left open; it is the only kind that cannot be read off the input.
            if open_axis is None:
                open_axis = axis
            else:
                total = _product(graph, source, inputs)
                sizes[axis] = graph.call_function(operator.floordiv, (total, math.prod(result[i] for i in rest)))
    # Merged sizes next; of those, the first takes the open place if there is still one.
    for axis, inputs in sorted(derived, key=lambda item: (-len(item[1]), item[0])):
        if open_axis is None and (len(inputs) > 1 or all(size != -1 for size in wanted)) and len(inputs) > 1:
            open_axis = axis
        else:
            sizes[axis] = _product(graph, source, inputs)
    if open_axis is None and -1 in wanted:
        open_axis = wanted.index(-1)
    if open_axis is not None:
        for axis, size in enumerate(wanted):
            # The file's own -1 must not stay beside ours.
            if isinstance(size, int) and size == -1 and axis != open_axis and sizes[axis] == -1:
                return None
        sizes[open_axis] = -1
    assert not isinstance(node.target, str)
    return graph.call_function(aten.reshape.default, (source, sizes))


def _free_axis(shape: list[Any], result: list[Any], inputs: list[int], outputs: list[int]) -> int:
    # Channels of images (shuffle): the number of groups stays. Features of sequences (attention): the width of a head
    # and the 3 of a joint query-key-value projection stay, the number of heads follows.
    if inputs == [1] and len(shape) >= 4:
        return outputs[-1]
    if len(outputs) > 2 and result[outputs[0]] in (2, 3):
        return outputs[1]
    return outputs[0]


def _product(graph: fx.Graph, source: fx.Node, axes: list[int]) -> Any:
    sizes = [graph.call_function(aten.sym_size.int, (source, axis)) for axis in axes]
    total = sizes[0]
    for size in sizes[1:]:
        total = graph.call_function(operator.mul, (total, size))
    return total


def _align(shape: list[Any], result: list[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Return groups of input axes and output axes with equal products; None where sizes do not line up."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(result):
        if i < len(shape) and j < len(result) and _same(shape[i], result[j]):
            groups.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        inputs: list[int] = []
        outputs: list[int] = []
        left = right = 1
        while True:
            if left == right and inputs and outputs:
                break
            if i < len(shape) and (left < right or not inputs):
                if not isinstance(shape[i], int):
                    return None
                left *= shape[i]
                inputs.append(i)
                i += 1
            elif j < len(result):
                if not isinstance(result[j], int):
                    return None
                right *= result[j]
                outputs.append(j)
                j += 1
            elif i < len(shape) and shape[i] == 1:
                inputs.append(i)
                i += 1
            else:
                return groups if left == right and not (inputs and outputs) and left == 1 else None
        groups.append((inputs, outputs))
    return groups


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return bool(left.node.expr == right.node.expr)
    return False
