"""From an uploaded file of any accepted format to a Program."""

from pathlib import Path

from app.recipes.plan import ModelFormat
from worker.engine.errors import ModelRejected
from worker.engine.programs.formats import refuse_other_formats
from worker.engine.programs.import_pt2 import open_pt2
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import EXPORT_LINES, reject


def open_program(path: Path, directory: Path, format: ModelFormat = "pt2", architecture: str | None = None) -> Program:
    """Check the uploaded file at `path` and return it as a trainable program; raises ModelRejected.

    `directory` is scratch. `architecture` names the catalogue's program for a state dict (safetensors) alone.
    """
    refuse_other_formats(path, format)
    if architecture is not None and format != "safetensors":
        reject(
            "architecture_not_taken",
            f"A file of format {format} brings its own program; an architecture goes with safetensors only.",
            "Leave the architecture out.",
        )
    if format == "pt2":
        return open_pt2(path, directory)
    fix = ""
    try:
        # Each brings libraries that the others do without.
        if format == "hf":
            from worker.engine.programs.hugging_face import HUGGING_FACE_FIX, open_hugging_face

            fix = HUGGING_FACE_FIX
            return open_hugging_face(path, directory)
        if format == "onnx":
            from worker.engine.programs.onnx_import import ONNX_FIX, open_onnx

            fix = ONNX_FIX
            return open_onnx(path, directory)
        from worker.engine.programs.state_dict import STATE_DICT_FIX, open_state_dict

        fix = STATE_DICT_FIX
        return open_state_dict(path, directory, architecture)
    except ModelRejected as error:
        # The readers that all formats share know the fix for a .pt2 only.
        if error.fix == EXPORT_LINES:
            error.fix = fix
        raise
