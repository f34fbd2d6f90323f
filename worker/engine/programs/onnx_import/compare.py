"""The last check of an imported graph: on random inputs it must compute what ONNX Runtime computes from the file."""

import math
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import onnxruntime
import torch

from worker.engine.programs.capture import evaluating, tracing_batch_size
from worker.engine.programs.onnx_import.read import EXPORT_FIX, OnnxGraph, write_onnx
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject, shown

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Largest difference that rounding can explain, relative to the largest number of the output and in itself."""
_WRONG_INTEGERS = 0.01
"""Share of integers (chosen classes, say) that may differ because two numbers were nearly equal."""
_AT_ONCE = 2**20
"""Numbers compared at a time: in double precision a large output would take several times its memory."""


def compare_with_onnx_runtime(program: Program, graph: OnnxGraph) -> float:
    """Return the largest relative difference of the outputs; raises ModelRejected where one is too large.

    Sizes that may vary are tried at two values.
    """
    session = _open_session(graph)
    largest = 0.0
    for index, inputs in enumerate(_make_inputs(program)):
        names = [value.name for value in graph.inputs]
        try:
            expected = session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})
        except Exception as error:
            if index:
                # The graph takes less sizes than are known.
                break
            _refuse_file(error)
        try:
            with evaluating(program), torch.no_grad():
                outputs = [value.detach().numpy() for value in program.module(*inputs)]
        except Exception as error:
            reject(
                "graph_not_runnable",
                f"The imported model cannot run on inputs of the shapes {[tuple(value.shape) for value in inputs]}: "
                f"{type(error).__name__}: {shown(error)}.",
                EXPORT_FIX,
            )
        for value, mine, theirs in zip(graph.outputs, outputs, expected, strict=True):
            largest = max(largest, _difference(value.name, np.asarray(mine), np.asarray(theirs)))
    return largest


def _make_inputs(program: Program) -> list[tuple[torch.Tensor, ...]]:
    signature = program.signature
    batch_size = tracing_batch_size(program)
    if signature.batch_size is None:
        high = signature.dynamic_ranges.get("batch", (1, None))[1]
        batch_size = 3 if high is None or high >= 3 else batch_size
    made = [program.example_inputs(batch_size, seed=1)]
    smaller = {
        word: max(signature.dynamic_ranges.get(word, (1, None))[0], size - max(1, size // 4))
        for word, size in signature.example_sizes.items()
        if word != "batch"
    }
    if smaller:
        other = replace(program, signature=replace(signature, example_sizes={**signature.example_sizes, **smaller}))
        made.append(other.example_inputs(batch_size, seed=2))
    return made


def _open_session(graph: OnnxGraph) -> Any:
    options = onnxruntime.SessionOptions()
    # Nothing is rewritten or computed in advance: the file's own operators are what the import is held against.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(write_onnx(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Its errors share no base class.
        return _refuse_file(error)


def _refuse_file(error: Exception) -> NoReturn:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reject("onnx_not_runnable", f"ONNX Runtime cannot run the file: {shown(line)}.", EXPORT_FIX)


def _difference(name: str, mine: Any, theirs: Any) -> float:
    if mine.shape != theirs.shape:
        _refuse(name, f"has the shape {mine.shape} instead of {theirs.shape}")
    if mine.size == 0:
        return 0.0
    if theirs.dtype.kind != "f":
        share = float((mine != theirs).mean())
        if share > _WRONG_INTEGERS:
            _refuse(name, f"differs in {share:.1%} of its numbers")
        return 0.0
    largest = difference = 0.0
    mine, theirs = mine.reshape(-1), theirs.reshape(-1)
    for start in range(0, mine.size, _AT_ONCE):
        ours, right = (each[start : start + _AT_ONCE].astype(np.float64) for each in (mine, theirs))
        finite = np.isfinite(right)
        if not np.array_equal(finite, np.isfinite(ours)) or not np.array_equal(
            np.nan_to_num(ours[~finite], nan=7.0), np.nan_to_num(right[~finite], nan=7.0)
        ):
            _refuse(name, "is infinite or NaN in other places")
        largest = max(largest, float(np.abs(right[finite]).max(initial=0.0)))
        difference = max(difference, float(np.abs(ours - right)[finite].max(initial=0.0)))
    if not math.isfinite(difference) or difference > RELATIVE * largest + ABSOLUTE:
        _refuse(name, f"differs by {difference:.3g} where its largest number is {largest:.3g}")
    return difference / largest if largest else 0.0


def _refuse(name: str, words: str) -> None:
    reject(
        "import_differs",
        f"The imported model does not compute what ONNX Runtime computes from the file: on random inputs, its output "
        f"{shown(name)} {words}. Pare takes no model that it may have misunderstood.",
        "Export the live model with torch.export and upload the .pt2.",
    )
