"""Writing a program as a .pt2 that torch.export.load opens without Pare."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from worker.engine.programs.capture import capture
from worker.engine.programs.program import Program
from worker.engine.programs.rewrite import rewrite


def export_pt2(program: Program, path: Path) -> None:
    """Write `path`: eval mode, the signature's names and sizes, the same bytes for the same program."""
    exported = capture(program)
    _restore_names(exported, program.renamed)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as directory:
        raw = Path(directory) / "raw.pt2"
        torch.export.save(exported, raw)
        # Our own writer leaves out sample inputs, source paths and random ids.
        rewrite(raw, path, [facts.name for facts in program.signature.outputs])


def _restore_names(exported: ExportedProgram, renamed: Mapping[str, str]) -> None:
    """Let parameters have the names of the model that was uploaded."""
    for spec in exported.graph_signature.input_specs:
        if spec.target in renamed:
            spec.target = renamed[spec.target]
    for new in renamed.keys() & exported.state_dict.keys():
        exported.state_dict[renamed[new]] = exported.state_dict.pop(new)
