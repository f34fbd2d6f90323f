"""Making ONNX files: of torch's exporters, and by hand; and what ONNX Runtime computes from them."""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str]


def make_onnx_file(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Shape],
    tensors: dict[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """Write a graph. `kind`: the type of its inputs and outputs."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (tensors or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="test")
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def export_by_torchscript(model: nn.Module, inputs: tuple[Any, ...], path: Path, *, opset: int = 17,
                          dynamic: dict[str, dict[int, str]] | None = None) -> Path:  # fmt: skip
    """Export with torch's older exporter, as most files that are found were."""
    names = list(dynamic) if dynamic else None
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs, str(path), dynamo=False, opset_version=opset, input_names=names, dynamic_axes=dynamic
        )
    return path


def run_onnx(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[Array]:
    """Return what ONNX Runtime computes, as it runs by default."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    results: list[Array] = session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})
    return results


def open_checked(path: Path, batch_size: int | None = None, tolerance: float = 1e-4) -> Program:
    """Open a file and compare the program with ONNX Runtime at a batch of its own."""
    program = open_program(path, path.parent, "onnx")
    inputs = program.example_inputs(batch_size or program.signature.batch_size or 5, seed=3)
    with torch.no_grad():
        found = program.module.eval()(*inputs)
    for mine, theirs in zip(found, run_onnx(path, inputs), strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=tolerance, atol=tolerance)
    return program


def layers_of(program: Program) -> dict[str, str]:
    """Return path -> type of the layers."""
    return {
        name: type(module).__name__
        for name, module in program.module.named_modules()
        if name and type(module) is not nn.Module
    }
