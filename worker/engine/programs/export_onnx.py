"""Writing a program as ONNX: the signature's input and output names, variable sizes by name, nothing of the machine."""

import io
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import onnx
import torch
from torch.export import ExportedProgram

from worker.engine.errors import ExportFailed
from worker.engine.programs.capture import capture
from worker.engine.programs.lowering.lower import can_lower, lower
from worker.engine.programs.program import Program

OPSET = 18
"""What torch's exporter speaks natively, and ONNX Runtime's quantizer knows whole."""
_MAX_BYTES = 2**31 - 2**20


def export_onnx(program: Program, path: Path) -> None:
    """Write `path` in eval mode; the same bytes for the same program. Encoded weights are stored by their codes."""
    lowers = can_lower(program)
    model = make_onnx(program, keep_weights=lowers)
    if lowers:
        lower(model, program)
    path.write_bytes(model.SerializeToString(deterministic=True))


def make_onnx(program: Program, *, keep_weights: bool) -> onnx.ModelProto:
    """Return the program in eval mode as ONNX, checked, with the signature's names.

    With `keep_weights`, every parameter and buffer that the graph uses is an initializer of its own name and exact
    values (of tied names, one), because nothing is folded or transposed in advance. Without, the exporter optimizes.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.module.state_dict().values())
    if size > _MAX_BYTES:
        raise ExportFailed(
            f"The weights take {size} bytes; one ONNX file holds at most {_MAX_BYTES}.", code="onnx_too_large"
        )
    exported = capture(program)
    signature = program.signature
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _Quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        try:
            result = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=[facts.name for facts in signature.inputs],
                output_names=[facts.name for facts in signature.outputs],
                external_data=False,
                optimize=not keep_weights,
                verbose=False,
            )
        except Exception as error:
            raise ExportFailed(f"torch.onnx.export failed: {_reason(error)}", code="onnx_export_failed") from error
    assert result is not None
    model = result.model_proto
    _clean(model, program)
    _check(model, exported)
    return model


def _check(model: onnx.ModelProto, exported: ExportedProgram) -> None:
    # The exporter gives bytes that were shifted another type (torch 2.13); only inference over the whole tells.
    shifts = any("shift" in str(node.target) for node in exported.graph.nodes)
    try:
        onnx.checker.check_model(model, full_check=shifts)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportFailed(
            f"torch.onnx.export wrote a file that is no valid ONNX model: {_reason(error)}",
            code="onnx_export_failed",
            fix="Set recipe.target.runtime to 'torch', and leave 'onnx' and 'packed' out of recipe.outputs.formats.",
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def _clean(model: onnx.ModelProto, program: Program) -> None:
    """Remove source paths and stack traces, and give sizes the signature's names."""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    model.doc_string = ""
    for graph in graphs:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    words: dict[str, str] = {}
    for value, facts in zip(model.graph.input, program.signature.inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, facts.shape, strict=True):
            if dim.dim_param and isinstance(size, str):
                words[dim.dim_param] = size
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in words:
                dim.dim_param = words[dim.dim_param]


class _Quiet:
    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
