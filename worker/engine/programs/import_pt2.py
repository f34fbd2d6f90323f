"""From an uploaded .pt2 to a Program: check, rewrite, load the rewritten copy, import."""

import json
import zipfile
from pathlib import Path

import torch

from worker.engine.errors import EngineFailure
from worker.engine.programs.import_graph import import_program
from worker.engine.programs.program import Program
from worker.engine.programs.program_check import NAMES_MEMBER
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.rewrite import check_and_rewrite
from worker.engine.programs.trial import try_shapes


def open_pt2(path: Path, directory: Path) -> Program:
    """Check the uploaded .pt2 at `path` and return it as a trainable program. `directory` holds the rewritten copy."""
    return load_checked(check_and_rewrite(path, directory))


def load_checked(path: Path) -> Program:
    """Import an archive that check_and_rewrite wrote."""
    try:
        exported = torch.export.load(path)
    except Exception as error:
        # The archive is well-formed, yet torch cannot rebuild the graph it describes.
        reject("graph_not_loadable", f"torch cannot load the program: {shown(_first_line(error))}.")
    with zipfile.ZipFile(path) as archive:
        names = json.loads(archive.read(f"model/{NAMES_MEMBER}"))
    try:
        program = import_program(exported, tuple(names))
        _refuse_bfloat16(program)
        try_shapes(program)
    except EngineFailure:
        raise
    except Exception as error:
        # Each operator is known, but their arguments do not fit together; torch raises many types for that.
        reject("graph_not_runnable", f"The program cannot run: {type(error).__name__}: {shown(_first_line(error))}.")
    return program


def _refuse_bfloat16(program: Program) -> None:
    """Neither numpy, which statistics and artifacts pass through, nor ONNX Runtime on a CPU computes in it."""
    tensors = (*program.module.named_parameters(), *program.module.named_buffers())
    stored = [name for name, tensor in tensors if tensor.dtype == torch.bfloat16]
    given = [each.name for each in (*program.signature.inputs, *program.signature.outputs) if each.dtype == "bfloat16"]
    if stored or given:
        reject(
            "unsupported_dtype",
            f"{shown((stored or given)[0])} is of type bfloat16, in which Pare can neither measure nor write models.",
            "Convert the model with .float() or .half() before exporting it; training steps compute in bfloat16 where "
            "their precision is bf16.",
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
