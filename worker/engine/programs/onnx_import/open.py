"""From an uploaded ONNX file to a Program: read, build, export, read back, and compare with ONNX Runtime."""

import inspect
import itertools
import re
import warnings
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from worker.engine.errors import EngineFailure, ModelRejected
from worker.engine.programs.convert import MAX_BATCH_SIZE, read_back
from worker.engine.programs.onnx_import.compare import compare_with_onnx_runtime
from worker.engine.programs.onnx_import.constants import Constants
from worker.engine.programs.onnx_import.fuse import fuse
from worker.engine.programs.onnx_import.interpreter import Interpreter, fold
from worker.engine.programs.onnx_import.read import EXPORT_FIX, OnnxGraph, read_onnx
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject, shown

ONNX_FIX = EXPORT_FIX
_FOLDED_BYTES = 2**28
_MAX_STEPS = 5 * 10**11
_IMAGE_SIZES = (224, 256, 64, 32, 128, 299, 512, 28)
_LENGTHS = (16, 24, 8, 32, 64, 128, 80, 12)
_RESERVED = ("self", "torch", "device", "inf", "nan", "math", "operator", "fx_pytree", "pytree", "NoneType")
_WEIGHTS_NOTE = (
    "An ONNX file does not say which of its numbers are trained: every tensor of floating-point numbers among its "
    "initializers is taken as a weight."
)


def open_onnx(path: Path, directory: Path) -> Program:
    """Check the ONNX file at `path` and return it as a trainable program. `directory` is scratch.

    Layers get the names that the file's tensors or nodes have. The outputs are compared with those that ONNX Runtime
    computes from the file.
    """
    graph = read_onnx(path)
    constants = Constants(graph)
    try:
        nodes = fold(graph, graph.nodes, constants, graph.size_bytes + _FOLDED_BYTES)
        nodes = fuse(nodes, constants, {value.name for value in graph.outputs})
    except EngineFailure:
        raise
    except Exception as error:
        # Arguments that do not fit together raise many types.
        reject("graph_not_runnable", f"A constant cannot be computed: {_first_line(error)}.", EXPORT_FIX)
    interpreter = Interpreter(graph, nodes, constants)
    inputs, words = _run_once(interpreter, graph)
    _check_steps(interpreter.steps)
    module = _make_module(interpreter, graph)
    program = _export(module, inputs, words, directory)
    compare_with_onnx_runtime(program, graph)
    program.notes = (_WEIGHTS_NOTE, *_name_fixed(program, words))
    return program


def _check_steps(steps: int) -> None:
    # Both the file and the imported model are run for the comparison.
    if steps > _MAX_STEPS:
        reject(
            "too_much_work",
            f"The graph computes about {steps} multiplications for two examples; at most {_MAX_STEPS} are compared.",
            "Export the live model with torch.export and upload the .pt2, which is not run when it is checked.",
        )


def _words(graph: OnnxGraph) -> dict[str, dict[int, str]]:
    """Return input -> axis -> word of the size, for the sizes that may vary; "batch" is the first axis."""
    words: dict[str, dict[int, str]] = {}
    batch = {value.shape[0] for value in graph.inputs if value.shape} - {""}
    for value in graph.inputs:
        if value.shape is None:
            reject("unsupported_input", f"The input {shown(value.name)} says nothing about its shape.", EXPORT_FIX)
        words[value.name] = {
            axis: "batch" if axis == 0 or size in batch else size or f"{_identifier(value.name)}_{axis}"
            for axis, size in enumerate(value.shape)
            if isinstance(size, str)
        }
    return words


def _run_once(interpreter: Interpreter, graph: OnnxGraph) -> tuple[list[Tensor], dict[str, dict[int, str]]]:
    """Run on shapes alone, which makes the layers; returns example inputs of a size that the graph takes."""
    words = _words(graph)
    failure: Exception | None = None
    free = any(word != "batch" for axes in words.values() for word in axes.values())
    # Some files promise a batch that varies, and reshape to a batch of 1.
    for batch_size, attempt in itertools.product((2, 1), range(len(_LENGTHS) if free else 1)):
        inputs = _make_inputs(graph, words, batch_size, attempt)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with mode, torch.no_grad():
                interpreter.interpret([mode.from_tensor(value) for value in inputs])
        except EngineFailure:
            raise
        except Exception as error:
            # Torch raises many types for arguments that do not fit together; another size may fit.
            failure = failure or error
            continue
        interpreter.finished = True
        return inputs, words
    node = interpreter.running
    return reject(
        "graph_not_runnable",
        f"The operator {node.op if node else '?'} ({shown(node.name if node else '')}) cannot run on inputs of the "
        f"shapes {[tuple(value.shape) for value in inputs]}: {_first_line(failure)}.",
        EXPORT_FIX,
    )


def _make_inputs(graph: OnnxGraph, words: dict[str, dict[int, str]], batch_size: int, attempt: int) -> list[Tensor]:
    sizes: dict[str, int] = {"batch": batch_size}
    made: list[Tensor] = []
    for value in graph.inputs:
        shape: list[int] = []
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, int):
                shape.append(size)
                continue
            image = value.dtype.startswith("float") and len(value.shape or ()) == 4
            choices = _IMAGE_SIZES if image else _LENGTHS
            # Sizes of different names differ, so that one is not taken for the other.
            shape.append(sizes.setdefault(words[value.name][axis], choices[(attempt + len(sizes) - 1) % len(choices)]))
        dtype = getattr(torch, value.dtype)
        made.append(torch.zeros(shape, dtype=dtype))
    return made


def _identifier(name: str, prefix: str = "input_") -> str:
    clean = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:90] or "value"
    return prefix + clean if clean[0].isdigit() or iskeyword(clean) or clean in _RESERVED else clean


def _unique(names: list[str]) -> list[str]:
    found: dict[str, None] = {}
    counts: dict[str, int] = {}
    for name in names:
        candidate = name
        while candidate in found:
            counts[name] = counts.get(name, 1) + 1
            candidate = f"{name}_{counts[name]}"
        found[candidate] = None
    return list(found)


def _make_module(interpreter: Interpreter, graph: OnnxGraph) -> nn.Module:
    """Return the interpreter's layers as a module whose call has the graph's input names."""
    names = _unique([_identifier(value.name) for value in graph.inputs])
    outputs = _unique([_identifier(value.name, "output_") for value in graph.outputs])

    def forward(_self: nn.Module, *args: Tensor, **keywords: Tensor) -> dict[str, Tensor]:
        given = {**dict(zip(names, args, strict=False)), **keywords}
        return dict(zip(outputs, interpreter.interpret([given[name] for name in names]), strict=True))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind), *(inspect.Parameter(name, kind) for name in names)]
    # torch.export names a program's inputs after the parameters of forward.
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    interpreter.root.__class__ = type("ImportedOnnx", (nn.Module,), {"forward": forward})
    return interpreter.root.eval()


def _export(module: nn.Module, inputs: list[Tensor], words: dict[str, dict[int, str]], directory: Path) -> Program:
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, inputs, strict=True))
    axes = dict(zip(names, words.values(), strict=True))
    found = {word: (1, MAX_BATCH_SIZE) for each in axes.values() for word in each.values()}
    # Only the batch is known to have no limit; torch finds those of lengths (a table of positions has one).
    dims = {word: dim if word == "batch" else Dim.AUTO for word, dim in _dims(found).items()}
    try:
        try:
            return read_back(_capture(module, given, axes, dims), directory)
        except ModelRejected:
            raise
        except Exception:
            # The graph takes less sizes than the file says. torch finds out which, then they are said to it: left to
            # itself it takes no batch of 1.
            automatic = _capture(module, given, axes, dict.fromkeys(found, Dim.AUTO))
            found = _found_ranges(automatic, axes)
            try:
                return read_back(_capture(module, given, axes, _dims(found)), directory)
            except ModelRejected:
                raise
            except Exception:
                return read_back(automatic, directory)
    except EngineFailure:
        raise
    except Exception as error:
        return reject(
            "not_exportable",
            f"torch.export cannot capture the graph: {type(error).__name__}: {_first_line(error)}.",
            EXPORT_FIX,
        )


def _dims(ranges: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {
        word: Dim(f"size_{index}", min=low, max=high)
        for index, (word, (low, high)) in enumerate(ranges.items())
        if high > 1
    }


def _capture(
    module: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]], dims: dict[str, Any]
) -> ExportedProgram:
    shapes = {name: {axis: dims[word] for axis, word in axes[name].items() if word in dims} or None for name in inputs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes)


def _found_ranges(exported: ExportedProgram, axes: dict[str, dict[int, str]]) -> dict[str, tuple[int, int]]:
    placeholders = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    found: dict[str, tuple[int, int]] = {}
    for given, (_, named) in zip(exported.graph_signature.user_inputs, axes.items(), strict=True):
        for axis, word in named.items():
            size = placeholders[str(given)].shape[axis]
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                limit = exported.range_constraints[size.node.expr].upper
                found[word] = (1, min(MAX_BATCH_SIZE, int(limit)) if limit.is_Integer else MAX_BATCH_SIZE)
            else:
                # Fixed, or the multiple of another: stays as torch sees it.
                found[word] = (1, 1)
    return found


def _name_fixed(program: Program, words: dict[str, dict[int, str]]) -> list[str]:
    return [
        f"The file says that the size {word!a} of the input {facts.name} may vary; its graph works for {size} only."
        for facts, axes in zip(program.signature.inputs, words.values(), strict=True)
        for axis, word in axes.items()
        if isinstance(size := facts.shape[axis], int)
    ]


def _first_line(error: Exception | None) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shown(line)
