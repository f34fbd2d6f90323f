"""A program with 8-bit weights as an ONNX file, which ONNX Runtime computes in integers on the CPU."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import (
    QuantType,
    quant_pre_process,
    quantize_dynamic,
)
from torch import nn

from app.recipes.quantization import QuantizeInt8
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import Program
from worker.engine.quantization.dynamic_linear import find_linear_nodes, join_gelu, quantize_linear_layers
from worker.engine.quantization.embedding_tables import quantize_tables
from worker.engine.quantization.int8_built import Built
from worker.engine.quantization.int8_grid import Floats
from worker.engine.quantization.layers import find_layers, find_quantized
from worker.engine.quantization.onnx_attention import join_attention
from worker.engine.quantization.static_int8 import quantize_statically, quiet
from worker.engine.quantization.weight_only import store_weights
from worker.engine.training.examples import BoundExamples


class OnnxBuilder:
    """Writes ONNX files below a directory. `examples` are for mode static alone, `bits` those of a weight, 8 or 7."""

    def __init__(
        self,
        program: Program,
        step: QuantizeInt8,
        examples: BoundExamples | None,
        bits: int,
        directory: Path,
        *,
        seed: int,
        report: Callable[..., None],
    ) -> None:
        self._step, self._examples, self._bits, self._directory = step, examples, bits, directory
        self._seed, self._report = seed, report
        self.float_file = directory / "float.onnx"
        export_onnx(program, self.float_file)
        self.float_bytes = _count_bytes(onnx.load(self.float_file))

    def build(self, program: Program, word: str, scales: Mapping[str, Floats], plain: Program | None = None) -> Built:
        """Write `<word>_int8.onnx`."""
        step = self._step
        prepared, result = (self._directory / f"{word}_{name}.onnx" for name in ("prepared", "int8"))
        float_file = self.float_file if word == "plain" else prepared
        if word != "plain":
            export_onnx(program, float_file)
        exported = onnx.load(float_file)
        with quiet():
            quant_pre_process(float_file, prepared, skip_optimization=True, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        layers = find_layers(model, program)
        modules = dict(program.module.named_modules())
        chosen = [node for node, layer in layers.items() if layer not in step.skip_layers]
        scales_by_node = {node: scales[layer] for node, layer in layers.items() if layer in scales}
        if step.quantize_embeddings:
            quantize_tables(model, [node for node in chosen if isinstance(modules[layers[node]], nn.Embedding)])
        if step.mode == "weight_only":
            store_weights(model, chosen, per_channel=step.per_channel, scales_by_node=scales_by_node)
        elif step.mode == "dynamic":
            model = self._quantize_dynamically(model, layers, chosen, scales_by_node, prepared, result)
        else:
            assert self._examples is not None
            onnx.save(model, prepared)
            quantize_statically(
                program, step, self._examples, self._bits, prepared, result, model, layers,
                seed=self._seed, report=self._report,
            )  # fmt: skip
            model = onnx.load(result)
        result.write_bytes(model.SerializeToString(deterministic=True))
        done = find_quantized(model, exported, layers)
        arrays = [numpy_helper.to_array(each) for each in model.graph.initializer]
        return Built(
            program,
            plain or program,
            scales,
            result,
            frozenset(done),
            tuple(name for name in dict.fromkeys(layers.values()) if name not in done),
            parameters=sum(each.size for each in arrays),
            nonzero=sum(int(np.count_nonzero(each)) for each in arrays),
            weight_bytes=sum(each.nbytes for each in arrays),
        )

    def _quantize_dynamically(
        self,
        model: ModelProto,
        layers: dict[str, str],
        chosen: list[str],
        scales_by_node: dict[str, Floats],
        prepared: Path,
        result: Path,
    ) -> ModelProto:
        step = self._step
        join_gelu(model)
        join_attention(model)
        linear = set(find_linear_nodes(model)) & (set(chosen) | (set(find_linear_nodes(model)) - set(layers)))
        quantize_linear_layers(
            model, linear, bits=self._bits, per_channel=step.per_channel, per_row=step.per_row,
            scales_by_node=scales_by_node,
        )  # fmt: skip
        if any(node.op_type == "LSTM" and node.name in chosen for node in model.graph.node):
            onnx.save(model, prepared)
            with quiet():
                quantize_dynamic(
                    prepared, result, op_types_to_quantize=["LSTM"], per_channel=step.per_channel,
                    reduce_range=self._bits == 7, weight_type=QuantType.QInt8,
                    nodes_to_exclude=[node for node in layers if node not in chosen],
                )  # fmt: skip
            model = onnx.load(result)
        return model


def _count_bytes(model: ModelProto) -> int:
    return sum(numpy_helper.to_array(each).nbytes for each in model.graph.initializer)
