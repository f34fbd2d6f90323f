"""Linear layers of an ONNX file on integers, with activation ranges found at run time, by standard operators.

ONNX Runtime's own quantizer gives an activation one range for the whole batch: one unusual token then coarsens all
others. Here each row (token) is first divided by its own largest magnitude and the result multiplied by it again, so
that every row uses the whole grid: x @ W = r * ((x / r) @ W). The runtime fuses the integer part into one operator.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto

from worker.engine.quantization.int8_grid import Floats, round_to_int8
from worker.engine.quantization.onnx_graph import OnnxGraph

PerRow = Literal["all", "narrowing", "none"]
SMALLEST_ROW = np.float32(1e-12)
"""A row of zeros is divided by this."""


def quantize_linear_layers(
    model: ModelProto,
    nodes: Collection[str],
    *,
    bits: int,
    per_channel: bool,
    per_row: PerRow = "all",
    scales_by_node: Mapping[str, Floats] | None = None,
) -> ModelProto:
    """Put these MatMul and Gemm nodes (with constant weights) onto integers, in place. `bits`: of a weight, 8 or 7.

    `per_row`: which layers get their activations row by row; narrowing ones have more inputs than outputs.
    `scales_by_node`: of the outputs of weights that are on their grids already.
    """
    graph = OnnxGraph(model)
    quantized: dict[tuple[str, bool], tuple[str, str, str, str | None]] = {}
    for node in graph.nodes:
        weight = _weight(graph, node) if node.name in nodes else None
        if weight is None:
            graph.keep(node)
            continue
        x, output = node.input[0], node.output[0]
        by_rows = per_row == "all" or (per_row == "narrowing" and weight.shape[0] > weight.shape[1])
        if (x, by_rows) not in quantized:
            quantized[x, by_rows] = _quantize_activation(graph, x, per_row=by_rows)
        codes_of_x, scale_of_x, zero_of_x, rows = quantized[x, by_rows]
        stem = node.input[1]
        given = (scales_by_node or {}).get(node.name)
        codes, scales = round_to_int8(weight, 1 if per_channel else None, bits, given)
        names = (
            graph.store(f"{stem}_quantized", codes),
            graph.store(f"{stem}_scale", scales.reshape(-1) if per_channel else scales),
            graph.store(f"{stem}_zero_point", np.zeros((), np.int8)),
        )
        sums = graph.write("MatMulInteger", (codes_of_x, names[0], zero_of_x, names[2]), f"{output}_sums")
        scale = graph.write("Mul", (scale_of_x, names[1]), f"{output}_scale")
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
        result = graph.write("Cast", (sums,), f"{output}_cast", to=1)
        ends = [
            ("Mul", scale, "scaled"),
            *([("Mul", rows, "rows")] if rows else []),
            *([("Add", bias, "")] if bias else []),
        ]
        for index, (kind, other, word) in enumerate(ends):
            assert other is not None
            result = graph.write(kind, (result, other), output if index == len(ends) - 1 else f"{output}_{word}")
    return graph.finish()


def find_linear_nodes(model: ModelProto) -> list[str]:
    """Return the nodes that `quantize_linear_layers` can take."""
    graph = OnnxGraph(model)
    return [node.name for node in graph.nodes if _weight(graph, node) is not None]


def join_gelu(model: ModelProto) -> int:
    """Write GELU as x * (1 + erf(x / sqrt 2)) * 0.5, the order in which ONNX Runtime fuses it. Returns how many.

    The exporter writes x * (0.5 * (1 + erf(...))), which the runtime computes in five passes over memory.
    """
    graph = OnnxGraph(model)
    makers = {node.output[0]: node for node in graph.nodes if len(node.output) == 1}
    halves: dict[str, tuple[str, str]] = {}
    for node in graph.nodes:
        for one, other in (tuple(node.input), tuple(reversed(node.input))) if node.op_type == "Mul" else ():
            add = makers.get(other)
            if (
                graph.scalar(one) == 0.5
                and add is not None
                and add.op_type == "Add"
                and len(graph.users(node.output[0])) == 1
                and any(name in makers and makers[name].op_type == "Erf" for name in add.input)
            ):
                halves[node.output[0]] = (one, other)
    done: set[str] = set()
    for node in graph.nodes:
        half = next((name for name in node.input if name in halves), None) if node.op_type == "Mul" else None
        if half is not None and half != node.output[0]:
            done.add(half)
    for node in graph.nodes:
        if node.output and node.output[0] in done:
            continue
        half = next((name for name in node.input if name in done), None)
        if half is None:
            graph.keep(node)
            continue
        constant, sum_ = halves[half]
        x = next(name for name in node.input if name != half)
        product = graph.write("Mul", (x, sum_), half)
        graph.write("Mul", (product, constant), node.output[0])
    graph.finish()
    return len(done)


def _quantize_activation(graph: OnnxGraph, x: str, *, per_row: bool) -> tuple[str, str, str, str | None]:
    rows = None
    source = x
    if per_row:
        magnitudes = graph.write("Abs", (x,), f"{x}_magnitudes")
        axes = graph.store("last_axis", np.array([-1], np.int64))
        largest = graph.write("ReduceMax", (magnitudes, axes), f"{x}_largest", keepdims=1)
        rows = graph.write("Max", (largest, graph.store("smallest_row", np.asarray(SMALLEST_ROW))), f"{x}_rows")
        source = graph.write("Div", (x, rows), f"{x}_even")
    names = [f"{source}_{word}" for word in ("quantized", "scale", "zero_point")]
    graph.write_many("DynamicQuantizeLinear", (source,), names)
    return names[0], names[1], names[2], rows


def _weight(graph: OnnxGraph, node: NodeProto) -> np.ndarray | None:
    """Return the (inputs, outputs) weight of a linear layer's node."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = graph.constant(node.input[1])
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return None
    if node.op_type == "Gemm":
        options = {each.name: (each.f if each.type == 1 else each.i) for each in node.attribute}
        if options.get("transA", 0) or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
            return None
        return weight.T if options.get("transB", 0) else weight
    return weight
