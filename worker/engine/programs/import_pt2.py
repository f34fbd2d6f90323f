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
        try_shapes(program)
    except EngineFailure:
        raise
    except Exception as error:
        # Each operator is known, but their arguments do not fit together; torch raises many types for that.
        reject("graph_not_runnable", f"The program cannot run: {type(error).__name__}: {shown(_first_line(error))}.")
    return program


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
