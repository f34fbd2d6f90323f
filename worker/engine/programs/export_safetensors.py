"""Writing a program's weights and buffers as safetensors, under their original names."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from worker.engine.programs.original_names import restore_state
from worker.engine.programs.program import Program


def export_safetensors(program: Program, path: Path) -> None:
    """Write `path`. A tensor with several names is stored once per name; the file's metadata lists such groups."""
    # The format knows no sharing: each name gets its own copy.
    tensors = {
        name: tensor.detach().contiguous().clone(memory_format=torch.contiguous_format)
        for name, tensor in restore_state(program.module.state_dict(), program).items()
    }
    metadata = {"format": "pt"}
    if program.tied:
        metadata["tied"] = ";".join(",".join(group) for group in program.tied)
    save_file(tensors, path, metadata)
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    # The library writes its metadata in an order that differs from process to process.
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":")).encode()
        assert len(ordered) <= size
        file.seek(8)
        file.write(ordered.ljust(size))
