"""Recognizing files by content: what is not of the format the upload said is refused with what to do."""

import re
import struct
from pathlib import Path

from app.recipes.plan import ModelFormat
from worker.engine.programs.rejections import EXPORT_LINES, reject

_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
"""How a ZIP archive begins, and how the record after its directory does."""
_CONFIG_ENTRY = re.compile(rb"PK\x01\x02.{42}(?:[A-Za-z0-9_.\-]{1,200}/)?config\.json", re.DOTALL)
"""The entry of config.json, alone or in one folder, in a ZIP's directory; a .pt2 has members that only end so."""
_ZIP_MARKS = (
    (b"/constants.pkl", "torchscript", "a TorchScript program; it runs code when loaded"),
    (b"/data.pkl", "pickle", "a pickle written by torch.save; it runs code when loaded"),
    (
        b"serialized_exported_program.json",
        "old_archive",
        "a torch.export program of an old layout with pickled tensors",
    ),
)
_ONNX_MARKS = (b"pytorch", b"onnx", b"ai.onnx", b"tf2onnx", b"skl2onnx", b"keras", b"paddle", b"CNTK", b"pare")
_UPLOAD_AS: dict[ModelFormat, str] = {
    "pt2": "Upload it with format=pt2.",
    "hf": "Upload it with format=hf.",
    "onnx": "Upload it with format=onnx.",
    "safetensors": "Upload it with format=safetensors and the architecture that uses the weights, for example "
    "architecture=resnet20 (GET /v1/architectures lists them).",
}
_WORDS: dict[ModelFormat, str] = {
    "pt2": "a torch.export program",
    "hf": "a zip with a config.json, as of a Hugging Face folder",
    "onnx": "an ONNX model",
    "safetensors": "a safetensors file: weights without the program that uses them",
}


def refuse_other_formats(path: Path, expected: ModelFormat = "pt2") -> None:
    """Raise ModelRejected, naming the format, unless the file begins like one of the expected format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, size - 2**20))
        tail = file.read()
    if not head:
        reject("not_a_model", "The file is empty.")
    found = _recognize(head, tail, size)
    # Not every ONNX file names its producer, nor early; the version of the format it begins with always is small.
    if found == expected or (found is None and expected == "onnx" and head[:1] == b"\x08" and head[1:2] < b"\x20"):
        return
    if found is not None:
        # Still the three lines: a .pt2 of the live model needs nothing else.
        reject(
            f"format_{found}",
            f"The file is {_WORDS[found]}, but it was uploaded with format={expected}.",
            f"{_UPLOAD_AS[found]} Or: {EXPORT_LINES}",
        )
    if head.startswith(_ZIP):
        if _ZIP_END not in tail:
            reject(
                "file_cut_off",
                f"The file begins like a ZIP archive, as a .pt2 does, and ends after {size} bytes without a directory.",
                "Upload the whole file; compare its size with the original's.",
            )
        for mark, kind, words in _ZIP_MARKS:
            if mark in tail:
                _refuse(kind, words)
        _refuse("zip", "a ZIP archive that is neither a torch.export program nor a Hugging Face folder")
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        _refuse("pickle", "a pickle; it runs code when loaded")
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        _refuse("compressed", "a compressed file or tar archive")
    if head.startswith(b"GGUF"):
        _refuse("gguf", "a GGUF file: weights without the program that uses them")
    if head.startswith(b"\x89HDF"):
        _refuse("hdf5", "an HDF5 (Keras) file")
    if len(head) > 9 and head[8:9] == b"{" and (length := struct.unpack("<Q", head[:8])[0]) < 2**32:
        reject(
            "file_cut_off",
            f"The file begins like safetensors with a header of {length} bytes, and ends after {size}.",
            "Upload the whole file; compare its size with the original's.",
        )
    reject("not_a_model", f"The file begins with {head[:8]!r}; it is not {_WORDS[expected]}.")


def _recognize(head: bytes, tail: bytes, size: int) -> ModelFormat | None:
    if head.startswith(_ZIP):
        # The names of a ZIP's members stand uncompressed in its directory, at the end.
        if b"archive_format" in tail:
            return "pt2"
        return "hf" if _CONFIG_ENTRY.search(tail) and b"/data.pkl" not in tail else None
    if len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "safetensors"
    return "onnx" if head[:1] == b"\x08" and any(word in head for word in _ONNX_MARKS) else None


def _refuse(kind: str, words: str) -> None:
    reject(f"format_{kind}", f"The file is {words}.")
