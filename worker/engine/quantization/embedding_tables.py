"""Embedding tables of an ONNX file in 8 bits: one scale per row, rows looked up as integers and scaled afterwards."""

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, TensorProto

from worker.engine.quantization.int8_grid import round_to_int8
from worker.engine.quantization.onnx_graph import OnnxGraph


def quantize_tables(model: ModelProto, nodes: Collection[str]) -> set[str]:
    """Store the tables of these Gather nodes as int8 (rows, width) and float scales (rows, 1), in place.

    Returns the names of the tables. A table stays in floating point where another node needs its numbers: it would be
    stored twice. The error of a number is at most half its row's scale: max |row| / 254.
    """
    graph = OnnxGraph(model)
    tables = {
        node.input[0]
        for node in graph.nodes
        if node.name in nodes and node.op_type == "Gather" and _is_table(graph.constant(node.input[0]))
    }
    tables = {
        name
        for name in tables
        if all(
            node.name in nodes and node.op_type == "Gather" and node.input[0] == name and not _axis(node)
            for node in graph.users(name)
        )
    }
    for node in graph.nodes:
        if node.op_type != "Gather" or node.input[0] not in tables:
            graph.keep(node)
            continue
        name, index = node.input
        output = node.output[0]
        table = graph.constant(name)
        assert table is not None
        codes, scales = round_to_int8(table, 0)
        rows = graph.write("Gather", (graph.store(f"{name}_quantized", codes), index), f"{output}_codes")
        factors = graph.write("Gather", (graph.store(f"{name}_scale", scales), index), f"{output}_scales")
        wide = graph.write("Cast", (rows,), f"{output}_wide", to=TensorProto.FLOAT)
        graph.write("Mul", (wide, factors), output)
    graph.finish()
    return tables


def _is_table(array: np.ndarray | None) -> bool:
    return array is not None and array.ndim == 2 and array.dtype == np.float32


def _axis(node: object) -> int:
    return next((each.i for each in node.attribute if each.name == "axis"), 0)  # type: ignore[attr-defined]
