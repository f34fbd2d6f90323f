"""From a live module that Pare built itself to a Program: export it, then read it like an uploaded .pt2."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from worker.engine.programs.import_pt2 import open_pt2
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject, shown

MAX_BATCH_SIZE = 4096
"""Largest batch that a converted program takes; torch.export wants a bound."""


def convert(
    module: nn.Module, inputs: dict[str, Tensor], lengths: dict[str, dict[int, Any]], directory: Path, fix: str
) -> Program:
    """Return the module as a program whose batch varies.

    `inputs` are named examples with batch 2; `lengths` gives further variable axes of an input. torch.export.save is
    followed by the same strict reading that an uploaded file goes through, so that every job sees the same program.
    """
    batch = Dim("batch", min=1, max=MAX_BATCH_SIZE)
    shapes = {name: {0: batch, **lengths.get(name, {})} for name in inputs}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module.eval(), (), inputs, dynamic_shapes=shapes)
        path = _save(exported, directory)
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        reject("not_exportable", f"torch.export cannot capture the model: {type(error).__name__}: {shown(line)}.", fix)
    return _open_once(path, directory)


def read_back(exported: ExportedProgram, directory: Path) -> Program:
    """Save an exported program and read it like an uploaded .pt2."""
    return _open_once(_save(exported, directory), directory)


def _save(exported: ExportedProgram, directory: Path) -> Path:
    path = directory / "converted.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, path)
    return path


def _open_once(path: Path, directory: Path) -> Program:
    program = open_pt2(path, directory)
    path.unlink()
    return program
