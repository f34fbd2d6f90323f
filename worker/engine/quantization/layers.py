"""Which node of an exported ONNX file is which layer of the program, and which of them hold integers."""

import re

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper
from torch import nn

from worker.engine.programs.program import Program

WEIGHTED_OPERATORS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "Gather")
_QUANTIZED = re.compile(r"(.+?)(?:_Transposed(?:_\d+)?)?_quantized")
"""What the quantizer calls the integer form of a weight."""


def find_layers(model: ModelProto, program: Program) -> dict[str, str]:
    """Return node name -> layer name for the nodes that hold a layer's weight, by its name or its numbers."""
    initializers = {each.name: each for each in model.graph.initializer}
    modules = {
        name: layer
        for name, layer in program.module.named_modules()
        if isinstance(getattr(layer, "weight", None), nn.Parameter)
    }
    recurrent = [name for name, layer in program.module.named_modules() if isinstance(layer, nn.RNNBase)]
    by_content: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, layer in modules.items():
        if isinstance(layer, nn.Linear):
            # A linear layer on more than two axes becomes a MatMul with the transposed weight, under a new name.
            array = np.ascontiguousarray(layer.weight.detach().cpu().float().numpy().T)
            by_content.setdefault((array.shape, array.tobytes()), name)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED_OPERATORS:
            continue
        weight = next((initializers[name] for name in node.input[:3] if name in initializers), None)
        if weight is None:
            continue
        layer_name = weight.name.removesuffix(".weight")
        if layer_name in modules:
            found[node.name] = layer_name
        elif node.op_type in ("LSTM", "GRU") and recurrent:
            found[node.name] = recurrent.pop(0) if len(recurrent) > 1 else recurrent[0]
        elif len(weight.dims) == 2:
            array = numpy_helper.to_array(weight).astype(np.float32)
            match = by_content.get((array.shape, array.tobytes()))
            if match is not None:
                found[node.name] = match
    return found


def find_quantized(quantized: ModelProto, exported: ModelProto, layers: dict[str, str]) -> set[str]:
    """Return the layers (of `layers`, node name -> layer name) whose weight is stored in integers."""
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    integers = {
        match.group(1)
        for each in quantized.graph.initializer
        if each.data_type in kinds and (match := _QUANTIZED.fullmatch(each.name))
    }
    return {
        layers[node.name] for node in exported.graph.node if node.name in layers and not integers.isdisjoint(node.input)
    }
