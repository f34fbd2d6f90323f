"""Writing a program in any format."""

import shutil
from collections.abc import Callable
from pathlib import Path

from app.recipes.recipe import Format, Target
from worker.engine.programs.decoding.store import store_codes
from worker.engine.programs.export_aoti import export_aoti
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_packed import export_packed
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.export_safetensors import export_safetensors
from worker.engine.programs.program import FileProgram, Program

EXPORTS: dict[Format, Callable[[Program, Path], None]] = {
    "onnx": export_onnx,
    "pt2": export_pt2,
    "safetensors": export_safetensors,
    "packed": export_packed,
}


def export(
    program: Program | FileProgram,
    module: Program,
    form: Format,
    path: Path,
    target: Target,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Write `path`. `module`: the program as a module, where it is a file; such a file is copied, or compiled.

    For torch, encoded weights stay codes; for ONNX Runtime, .pt2 is a form to go on from.
    """
    for_torch = target.runtime != "onnxruntime" and form in ("pt2", "safetensors")
    if isinstance(program, Program) and (for_torch or form == "aoti"):
        program = store_codes(program)
    if form == "aoti":
        note(f"  {path.name} compiled in {export_aoti(program, module, path, target):.0f} s")
    elif isinstance(program, FileProgram):
        # A copy: in the sandbox, tmp and out lie on different file systems, across which nothing can be renamed.
        shutil.copyfile(program.path, path)
    else:
        EXPORTS[form](program, path)
