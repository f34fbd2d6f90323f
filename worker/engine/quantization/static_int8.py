"""Static integers by ONNX Runtime's quantizer: ranges of activations from calibration data, convolutions too."""

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from torch import Tensor

from app.recipes.quantization import QuantizeInt8
from worker.engine.programs.program import Program
from worker.engine.quantization.calibration import CALIBRATION_BATCH, CalibrationReader
from worker.engine.quantization.ranges import find_activations, measure_ranges
from worker.engine.training.examples import BoundExamples

STATIC_OPERATORS = ["Conv", "ConvTranspose", "MatMul", "Gemm", "Relu", "Clip"]
IMAGE_OPERATORS = ["Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Resize"]
"""Quantized too in purely convolutional models, so that integers flow from layer to layer. In transformers these would
round the residual stream, which costs much accuracy."""
CALIBRATION = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
    # The ranges that were found are handed over tensor by tensor.
    "mse": CalibrationMethod.MinMax,
}


def quantize_statically(
    program: Program,
    step: QuantizeInt8,
    examples: BoundExamples,
    bits: int,
    prepared: Path,
    result: Path,
    model: ModelProto,
    layers: dict[str, str],
    *,
    seed: int,
    report: Callable[..., None],
) -> None:
    """Write `prepared` (which is `model`) with integers to `result`; `layers`: node name -> layer name."""
    operators = _choose_static_operators(model)
    # Batch by batch: otherwise the quantizer holds the activations of all examples in memory.
    extra: dict[str, Any] = {"CalibStridedMinMax": 1, "MatMulConstBOnly": True}
    if step.calibration == "mse":
        names = [tensor.name for tensor in program.signature.inputs]

        def open_feeds() -> Iterator[dict[str, np.ndarray]]:
            for inputs in calibration_batches(step, examples, seed):
                yield {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}

        ranges = measure_ranges(model, find_activations(model, operators), open_feeds, prepared.parent)
        extra["TensorQuantOverrides"] = {
            name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, (low, high) in ranges.items()
        }
    with quiet():
        quantize_static(
            prepared,
            result,
            CalibrationReader(examples, program, step.num_calibration_examples, seed, report),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=operators,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=step.per_channel,
            reduce_range=bits == 7,
            nodes_to_exclude=_with_rewritten_names([n for n, layer in layers.items() if layer in step.skip_layers]),
            calibrate_method=CALIBRATION[step.calibration],
            extra_options=extra,
        )


def calibration_batches(step: QuantizeInt8, examples: BoundExamples, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the inputs that the step calibrates on."""
    size = min(CALIBRATION_BATCH, step.num_calibration_examples)
    wanted = -(-step.num_calibration_examples // (examples.fixed_batch or size))
    for inputs, _ in itertools.islice(examples.training_batches(size, seed=seed), wanted):
        yield inputs


def _with_rewritten_names(nodes: list[str]) -> list[str]:
    # The dynamic quantizer first turns a Gemm into a MatMul of this name.
    return [name for node in nodes for name in (node, f"{node}_MatMul")]


def _choose_static_operators(model: ModelProto) -> list[str]:
    kinds = {node.op_type for node in model.graph.node}
    convolutional = bool(kinds & {"Conv", "ConvTranspose"}) and not kinds & {"Softmax", "LayerNormalization"}
    return STATIC_OPERATORS + (IMAGE_OPERATORS if convolutional else [])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantizer's prints off stdout and its advice to preprocess out of the log."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
