"""Numbers that a program stores: all of them, those that are not zero, and the bytes they take when packed."""

from dataclasses import dataclass

import torch

from worker.engine.packing.tensors import RAW, Array, pack_encoding, pack_plain, pack_pool
from worker.engine.programs.program import FileProgram, Program


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a program stores. A zero is stored like any other number."""

    total: int
    nonzero: int


def count_parameters(program: Program | FileProgram) -> ParameterCount:
    """Count the parameters; a tensor shared by several layers counts once."""
    if isinstance(program, FileProgram):
        return ParameterCount(program.parameters, program.nonzero_parameters)
    parameters = list(program.module.parameters())
    return ParameterCount(
        sum(each.numel() for each in parameters), sum(int(torch.count_nonzero(each)) for each in parameters)
    )


def count_packed_bytes(program: Program) -> int:
    """Return the bytes of the parameters and buffers in a packed file, which has the graph and an index besides.

    Weights without an encoding share tables, in the order of the file; so a part of it may differ by a few bytes.
    """
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    encodings = {id(parameters[name]): encoding for name, encoding in program.encodings.items()}
    num_bytes = 0
    raw: dict[torch.dtype, list[Array]] = {}
    for tensor in (*program.module.parameters(), *program.module.buffers()):
        encoding = encodings.get(id(tensor))
        array = tensor.detach().cpu().numpy()
        coding, packed = pack_plain(array) if encoding is None else pack_encoding(encoding)
        num_bytes += len(packed)
        if coding == RAW:
            raw.setdefault(tensor.dtype, []).append(array)
    return num_bytes + sum(len(pack_pool(arrays)) for arrays in raw.values())


def count_nonzero_by_layer(program: Program) -> dict[str, int]:
    """Return, for each layer with parameters of its own, how many of them are not zero."""
    return {
        name: sum(int(torch.count_nonzero(each)) for each in layer.parameters(recurse=False))
        for name, layer in program.module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    }
