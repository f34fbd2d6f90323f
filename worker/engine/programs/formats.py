"""Recognizing, by content, the files people upload instead of a .pt2; each is refused with what to do."""

import struct
from pathlib import Path

from worker.engine.programs.rejections import reject

_ZIP = b"PK\x03\x04"
_ZIP_MARKS = (
    (b"/constants.pkl", "torchscript", "a TorchScript program; it runs code when loaded"),
    (b"/data.pkl", "pickle", "a pickle written by torch.save; it runs code when loaded"),
    (
        b"serialized_exported_program.json",
        "old_archive",
        "a torch.export program of an old layout with pickled tensors",
    ),
)


def refuse_other_formats(path: Path) -> None:
    """Raise ModelRejected, naming the format, unless the file begins like a .pt2 archive."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, size - 2**20))
        tail = file.read()
    if not head:
        reject("not_a_model", "The file is empty.")
    if head.startswith(_ZIP):
        # The names of a ZIP's members stand uncompressed in its directory, at the end.
        if b"archive_format" in tail:
            return
        for mark, kind, words in _ZIP_MARKS:
            if mark in tail:
                _refuse(kind, words)
        _refuse("zip", "a ZIP archive that is not a torch.export program")
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        _refuse("pickle", "a pickle; it runs code when loaded")
    if len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        _refuse("safetensors", "a safetensors file: weights without the program that uses them")
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        _refuse("compressed", "a compressed file or tar archive")
    if head.startswith(b"GGUF"):
        _refuse("gguf", "a GGUF file: weights without the program that uses them")
    if head.startswith(b"\x89HDF"):
        _refuse("hdf5", "an HDF5 (Keras) file")
    if head[:1] == b"\x08" and any(word in head for word in (b"pytorch", b"onnx", b"ai.onnx", b"tf2onnx", b"skl2onnx")):
        _refuse("onnx", "an ONNX model, whose weights cannot be trained here")
    reject("not_a_model", f"The file begins with {head[:8]!r}; it is not a .pt2 archive.")


def _refuse(kind: str, words: str) -> None:
    reject(f"format_{kind}", f"The file is {words}.")
