"""Attention of an exported graph as one operator of ONNX Runtime instead of some twenty.

The exporter writes softmax(q k^T / sqrt(d) + mask) v as transpositions, reshapes, products and a guard against rows
that attend to nothing. MultiHeadAttention (domain com.microsoft) takes queries, keys and values as the projections
leave them, (batch, positions, heads * size), and needs none of that. It is what an integer model spends its time on
once its projections are fast.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper

from worker.engine.quantization.onnx_graph import OnnxGraph

DOMAIN = "com.microsoft"
LOWEST = np.finfo(np.float32).min
"""In place of minus infinity: a row that attends to nothing gets a mean of all values, where the exported graph gives
zeros and others give NaN. No position that counts has such a row."""
SPLIT_HEADS = [0, 2, 1, 3]
Dim = int | str | None


@dataclass(frozen=True)
class _Attention:
    query: str
    key: str
    value: str
    mask: str | None
    scale: float
    num_heads: int
    output: str


def join_attention(model: ModelProto) -> int:
    """Put MultiHeadAttention in place of every attention that it can compute. Returns how many."""
    graph = OnnxGraph(model)
    found = _Finder(model, graph).find()
    if not found:
        return 0
    for node in graph.nodes:
        match = found.get(node.output[0]) if node.output else None
        if match is None:
            graph.keep(node)
            continue
        inputs = [match.query, match.key, match.value]
        if match.mask is not None:
            finite = f"{match.mask}_finite"
            if not graph.has_written(finite):
                graph.write("Max", (match.mask, graph.store("lowest", np.asarray(LOWEST))), finite)
            inputs += ["", "", finite]
        graph.write(
            "MultiHeadAttention", inputs, match.output, domain=DOMAIN, num_heads=match.num_heads, scale=match.scale
        )
    graph.finish()
    _remove_unread(model)
    if all(each.domain != DOMAIN for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(found)


class _Finder:
    def __init__(self, model: ModelProto, graph: OnnxGraph) -> None:
        self._graph = graph
        self._makers = {name: node for node in graph.nodes for name in node.output}
        self._reads = Counter(name for node in graph.nodes for name in node.input)
        self._outputs = {each.name for each in model.graph.output}
        self._shapes: dict[str, list[Dim]] = {
            each.name: [
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                for dim in each.type.tensor_type.shape.dim
            ]
            for each in (*model.graph.value_info, *model.graph.input)
        }

    def find(self) -> dict[str, _Attention]:
        """Return what was found by the name of its output, (batch, positions, heads * size)."""
        matches = (self._match(node) for node in self._graph.nodes if node.op_type == "Reshape")
        return {match.output: match for match in matches if match is not None}

    def _match(self, node: NodeProto) -> _Attention | None:
        output = node.output[0]
        merged = self._made(node.input[0], "Transpose", SPLIT_HEADS)
        product = self._made(merged.input[0], "MatMul") if merged else None
        if product is None:
            return None
        weights = self._without_guard(product.input[0])
        softmax = self._made(weights, "Softmax")
        value = self._joined(product.input[1])
        if softmax is None or value is None or _attribute(softmax, "axis", -1) not in (-1, 3):
            return None
        mask, scores = self._without_mask(softmax.input[0])
        scores, after = self._without_scale(scores)
        multiplied = self._made(scores, "MatMul")
        if multiplied is None:
            return None
        left, first = self._without_scale(multiplied.input[0])
        right, second = self._without_scale(multiplied.input[1])
        query, key = self._joined(left), self._joined_key(right)
        if query is None or key is None or query.heads != key.heads or value.heads != key.heads:
            return None
        if self._shapes.get(output) != [*query.shape[:2], value.shape[2]]:
            return None
        if mask is not None:
            shape = self._shapes.get(mask, [])
            if len(shape) != 4 or shape[2:] != [query.shape[1], key.shape[1]]:
                return None
        return _Attention(query.name, key.name, value.name, mask, first * second * after, query.heads, output)

    def _joined(self, name: str, order: list[int] = SPLIT_HEADS) -> "_Projection | None":
        """Return what was split into heads to give (batch, heads, positions, size), or these axes in another order."""
        split = self._made(name, "Transpose", order, shared=True)
        view = self._made(split.input[0], "Reshape", shared=True) if split else None
        if view is None:
            return None
        before, after = self._shapes.get(view.input[0], []), self._shapes.get(view.output[0], [])
        if len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
            return None
        width, size = before[2], after[3]
        if not isinstance(width, int) or not isinstance(size, int) or not size or width % size:
            return None
        return _Projection(view.input[0], before, width // size)

    def _joined_key(self, name: str) -> "_Projection | None":
        """Return what was split into heads and transposed to give (batch, heads, size, positions)."""
        at_once = self._joined(name, [0, 2, 3, 1])
        if at_once is not None:
            return at_once
        turned = self._made(name, "Transpose", [0, 1, 3, 2])
        if turned is not None:
            return self._joined(turned.input[0])
        # The exporter folds batch and heads into one axis, transposes, and unfolds.
        unfolded = self._made(name, "Reshape")
        inner = self._made(unfolded.input[0], "Transpose", [0, 2, 1]) if unfolded else None
        folded = self._made(inner.input[0], "Reshape") if inner else None
        if folded is None:
            return None
        # Of the sizes in between the exporter says nothing; that the product with the queries exists says the rest.
        return self._joined(folded.input[0]) if len(self._shapes.get(name, [])) == 4 else None

    def _without_guard(self, name: str) -> str:
        """Step over Where(IsNaN(x), 0, x)."""
        guard = self._made(name, "Where")
        if guard is None or self._graph.scalar(guard.input[1]) != 0.0:
            return name
        test = self._made(guard.input[0], "IsNaN")
        return guard.input[2] if test is not None and test.input[0] == guard.input[2] else name

    def _without_mask(self, name: str) -> tuple[str | None, str]:
        add = self._made(name, "Add")
        if add is None:
            return None, name
        for scores, mask in (add.input, reversed(add.input)):
            if self._made(self._without_scale(scores)[0], "MatMul") is not None:
                return mask, scores
        return None, name

    def _without_scale(self, name: str) -> tuple[str, float]:
        for kind in ("Mul", "Div"):
            scaled = self._made(name, kind)
            constant = self._graph.scalar(scaled.input[1]) if scaled else None
            if scaled is not None and constant:
                return scaled.input[0], constant if kind == "Mul" else 1 / constant
        return name, 1.0

    def _made(self, name: str, kind: str, order: list[int] | None = None, *, shared: bool = False) -> NodeProto | None:
        """Return the node that made `name`, if it is of this kind and nothing but the attention reads it."""
        node = self._makers.get(name)
        if node is None or node.op_type != kind or name in self._outputs:
            return None
        if order is not None and list(_attribute(node, "perm", [])) != order:
            return None
        # The guard reads the softmax twice; of a shared node, nothing is lost when others read it too.
        return node if shared or self._reads[name] <= (2 if kind == "Softmax" else 1) else None


@dataclass(frozen=True)
class _Projection:
    name: str
    shape: list[Dim]
    heads: int


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _remove_unread(model: ModelProto) -> None:
    """Remove nodes that lead nowhere."""
    graph = OnnxGraph(model)
    read = {each.name for each in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
            read.update(graph.read_inside(node))
    for node in reversed(kept):
        graph.keep(node)
    graph.finish()
