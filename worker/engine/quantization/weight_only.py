"""Weights of an ONNX file as 8-bit integers, turned back into floats by standard operators when they are used."""

from collections.abc import Collection, Mapping

import numpy as np
from onnx import ModelProto, NodeProto

from worker.engine.quantization.int8_grid import Floats, round_to_int8
from worker.engine.quantization.onnx_graph import OnnxGraph

WEIGHT_INPUTS = {"MatMul": (1,), "Gemm": (1,), "Conv": (1,), "ConvTranspose": (1,), "LSTM": (1, 2), "GRU": (1, 2)}


def store_weights(
    model: ModelProto, nodes: Collection[str], *, per_channel: bool, scales_by_node: Mapping[str, Floats] | None = None
) -> ModelProto:
    """Store the weights of these nodes as int8 with a DequantizeLinear before their use, in place.

    `scales_by_node`: of the outputs of weights that are on their grids already.
    """
    graph = OnnxGraph(model)
    done: dict[str, str] = {}
    for node in graph.nodes:
        for position in WEIGHT_INPUTS.get(node.op_type, ()) if node.name in nodes else ():
            name = node.input[position] if position < len(node.input) else ""
            weight = graph.constant(name)
            if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
                continue
            if name not in done:
                axis = _output_axis(node) if per_channel else None
                codes, scales = round_to_int8(weight, axis, scales=(scales_by_node or {}).get(node.name))
                inputs = (
                    graph.store(f"{name}_quantized", codes),
                    graph.store(f"{name}_scale", scales if axis is None else scales.reshape(-1)),
                )
                done[name] = graph.write(
                    "DequantizeLinear", inputs, f"{name}_dequantized", **({} if axis is None else {"axis": axis})
                )
            node.input[position] = done[name]
        graph.keep(node)
    return graph.finish()


def _output_axis(node: NodeProto) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(each.name == "transB" and each.i for each in node.attribute) else 1
    return 1
