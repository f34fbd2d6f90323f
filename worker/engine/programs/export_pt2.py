"""Writing a program as a .pt2 that torch.export.load opens without Pare."""

import tempfile
from pathlib import Path

import torch

from worker.engine.programs.capture import capture
from worker.engine.programs.original_names import restore_names
from worker.engine.programs.program import Program
from worker.engine.programs.rewrite import rewrite


def export_pt2(program: Program, path: Path) -> None:
    """Write `path`: eval mode, the signature's names and sizes, the same bytes for the same program."""
    exported = capture(program)
    restore_names(exported, program)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as directory:
        raw = Path(directory) / "raw.pt2"
        torch.export.save(exported, raw)
        # Our own writer leaves out sample inputs, source paths and random ids.
        rewrite(raw, path, [facts.name for facts in program.signature.outputs])
