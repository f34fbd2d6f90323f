"""Operators that exporters take apart, put together again: linear layers with a bias, layer norms, GELU."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from worker.engine.programs.onnx_import.constants import Constants
from worker.engine.programs.onnx_import.read import Node


class _Graph:
    def __init__(self, nodes: list[Node], constants: Constants, outputs: set[str]) -> None:
        self.nodes, self.constants, self.outputs = nodes, constants, outputs
        self.makers = {name: node for node in nodes for name in node.outputs if name}
        self.counts = Counter(name for node in nodes for name in node.inputs)

    def made_by(self, name: str, *ops: str, alone: bool = False) -> Node | None:
        """Return the node that makes a value, if it is of these operators; `alone`: and nothing else reads it."""
        node = self.makers.get(name)
        if node is None or node.op not in ops or name != node.outputs[0]:
            return None
        return None if alone and (self.counts[name] != 1 or name in self.outputs) else node

    def scalar(self, name: str) -> float | None:
        array = self.constants.arrays.get(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def vector(self, name: str, size: int | None = None) -> str | None:
        """Return the name of a constant vector, also where it is written with axes of 1 in front."""
        array = self.constants.arrays.get(name)
        if array is None or array.dtype.kind != "f" or array.ndim < 1 or array.shape[-1] != array.size:
            return None
        if size is not None and array.size != size:
            return None
        if array.ndim == 1:
            return name
        flat = f"{name}/flat"
        if flat not in self.constants.arrays:
            self.constants.add(flat, array.reshape(-1), trained=name in self.constants.trained, sources=(name,))
        return flat

    def per_channel(self, name: str) -> str | None:
        """Return the name of a constant vector that is written as (channels, 1, 1), or with a 1 in front of that."""
        array = self.constants.arrays.get(name)
        if array is None or array.dtype.kind != "f" or array.ndim < 2 or array.size < 2:
            return None
        shape = array.shape[1:] if array.shape[0] == 1 else array.shape
        if len(shape) < 2 or shape[0] != array.size:
            return None
        flat = f"{name}/channels"
        if flat not in self.constants.arrays:
            self.constants.add(flat, array.reshape(-1), trained=name in self.constants.trained, sources=(name,))
        return flat


def fuse(nodes: list[Node], constants: Constants, outputs: set[str]) -> list[Node]:
    """Return nodes of the same meaning, with fewer and larger operators where a pattern is known."""
    for rewrite in (_linear, _layer_norm, _group_norm, _gelu):
        graph = _Graph(nodes, constants, outputs)
        nodes = _without_unread([rewrite(graph, node) or node for node in nodes], outputs)
    return nodes


def _without_unread(nodes: list[Node], outputs: set[str]) -> list[Node]:
    read, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in read for name in node.outputs):
            kept.append(node)
            read.update(node.inputs)
    return kept[::-1]


def _linear(graph: _Graph, node: Node) -> Node | None:
    if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2]:
        weight = graph.constants.arrays.get(node.inputs[1])
        if weight is None or weight.ndim != 2:
            return None
        bias = graph.vector(node.inputs[2], weight.shape[0 if node.attributes.get("transB") else 1])
        return replace(node, inputs=(*node.inputs[:2], bias)) if bias else None
    if node.op != "Add":
        return None
    for left, right in (node.inputs, node.inputs[::-1]):
        product = graph.made_by(left, "MatMul", alone=True)
        if product is None or len(product.inputs) != 2:
            continue
        weight = graph.constants.arrays.get(product.inputs[1])
        # Three axes at most, so that the bias does not give the result more of them than it has.
        known = graph.constants.arrays.get(right)
        if weight is None or weight.ndim != 2 or known is None or known.ndim > 2:
            continue
        bias = graph.vector(right, weight.shape[1])
        if bias is not None:
            return Node("MatMul", product.name, (*product.inputs, bias), node.outputs, {}, product.scope or node.scope)
    return None


def _over_last(graph: _Graph, node: Node | None) -> bool:
    if node is None or node.attributes.get("keepdims", 1) != 1:
        return False
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] in graph.constants.arrays:
        axes = tuple(graph.constants.arrays[node.inputs[1]].reshape(-1).tolist())
    return axes == (-1,)


def _layer_norm(graph: _Graph, node: Node) -> Node | None:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * w + b."""
    if node.op != "Add":
        return None
    for left, right in (node.inputs, node.inputs[::-1]):
        scaled = graph.made_by(left, "Mul", alone=True)
        bias = graph.vector(right)
        if scaled is None or bias is None:
            continue
        for normal, factor in (scaled.inputs, scaled.inputs[::-1]):
            found = _normalized(graph, graph.made_by(normal, "Div", alone=True))
            weight = graph.vector(factor)
            if found is None or weight is None:
                continue
            if graph.constants.arrays[weight].shape == graph.constants.arrays[bias].shape:
                source, epsilon = found
                return Node("LayerNormalization", scaled.name, (source, weight, bias), node.outputs,
                            {"axis": -1, "epsilon": epsilon}, scaled.scope)  # fmt: skip
    return None


def _normalized(graph: _Graph, division: Node | None) -> tuple[str, float] | None:
    if division is None:
        return None
    centred = graph.made_by(division.inputs[0], "Sub")
    root = graph.made_by(division.inputs[1], "Sqrt")
    total = graph.made_by(root.inputs[0], "Add") if root else None
    if centred is None or total is None:
        return None
    for left, right in (total.inputs, total.inputs[::-1]):
        epsilon, variance = graph.scalar(right), graph.made_by(left, "ReduceMean")
        if epsilon is None or variance is None or not _over_last(graph, variance):
            continue
        square = graph.made_by(variance.inputs[0], "Pow", "Mul")
        if square is None:
            return None
        base = graph.made_by(square.inputs[0], "Sub")
        twice = square.op == "Mul" and square.inputs[0] == square.inputs[1]
        if base is None or base.inputs != centred.inputs or not (twice or graph.scalar(square.inputs[1]) == 2.0):
            return None
        mean = graph.made_by(centred.inputs[1], "ReduceMean")
        if mean is not None and mean.inputs[0] == centred.inputs[0] and _over_last(graph, mean):
            return centred.inputs[0], epsilon
    return None


def _group_norm(graph: _Graph, node: Node) -> Node | None:
    """InstanceNormalization of (batch, groups, rest), reshaped back, * w + b with one number per channel."""
    arrays = graph.constants.arrays
    for left, right in (node.inputs, node.inputs[::-1]) if node.op == "Add" else ():
        scaled, bias = graph.made_by(left, "Mul", alone=True), graph.per_channel(right)
        for back_name, factor in (scaled.inputs, scaled.inputs[::-1]) if scaled and bias else ():
            back, weight = graph.made_by(back_name, "Reshape", alone=True), graph.per_channel(factor)
            normal = graph.made_by(back.inputs[0], "InstanceNormalization", alone=True) if back else None
            split = graph.made_by(normal.inputs[0], "Reshape", alone=True) if normal else None
            if not (back and weight and bias and normal and split) or arrays[weight].shape != arrays[bias].shape:
                continue
            shape = arrays.get(split.inputs[1])
            ones, zeros = arrays.get(normal.inputs[1]), arrays.get(normal.inputs[2])
            if shape is None or shape.size != 3 or ones is None or zeros is None:
                continue
            source, channels, groups = split.inputs[0], arrays[weight].size, int(shape[1])
            same = graph.made_by(back.inputs[1], "Shape")
            returns = same is not None and same.inputs[0] == source and not any(same.attributes.values())
            if not returns or shape[0] != 0 or shape[2] != -1 or groups < 1 or channels % groups:
                continue
            if (ones == 1).all() and not zeros.any():
                epsilon = normal.attributes.get("epsilon", 1e-5)
                attributes = {"num_groups": groups, "epsilon": epsilon}
                inputs = (source, weight, bias)
                return Node("GroupNormalization", scaled.name, inputs, node.outputs, attributes, scaled.scope)  # type: ignore[union-attr]
    return None


def _factors(graph: _Graph, name: str, depth: int = 3) -> list[str]:
    """Return what is multiplied to make a value."""
    node = graph.makers.get(name)
    if node is None or node.op != "Mul" or depth == 0:
        return [name]
    return [factor for part in node.inputs for factor in _factors(graph, part, depth - 1)]


def _gelu(graph: _Graph, node: Node) -> Node | None:
    """0.5 * x * (1 + erf(x / sqrt(2))), multiplied in any order."""
    if node.op != "Mul":
        return None
    factors = _factors(graph, node.outputs[0])
    halves = [name for name in factors if graph.scalar(name) == 0.5]
    rest = [name for name in factors if name not in halves]
    if len(halves) != 1 or len(rest) != 2:
        return None
    for source, term in (rest, rest[::-1]):
        total = graph.made_by(term, "Add", alone=True)
        if total is None:
            continue
        for left, right in (total.inputs, total.inputs[::-1]):
            error = graph.made_by(left, "Erf", alone=True)
            scaled = graph.made_by(error.inputs[0], "Div", "Mul") if error else None
            if scaled is None or graph.scalar(right) != 1.0:
                continue
            pairs = [scaled.inputs] if scaled.op == "Div" else [scaled.inputs, scaled.inputs[::-1]]
            wanted = math.sqrt(2.0) if scaled.op == "Div" else math.sqrt(0.5)
            for inner, number in pairs:
                value = graph.scalar(number)
                if inner == source and value is not None and np.isclose(value, wanted, rtol=1e-6, atol=0):
                    return Node("Gelu", node.name, (source,), node.outputs, {}, node.scope)
    return None
