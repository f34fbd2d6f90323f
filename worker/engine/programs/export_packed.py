"""Writing a program as one packed file: the graph without weights, and every weight in as few bytes as it has bits.

docs/packed-format.md is the layout; load.py reads it without Pare.
"""

import itertools
import lzma
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from worker.engine import load
from worker.engine.errors import ExportFailed
from worker.engine.packing.encodings import Encoding
from worker.engine.packing.streams import pack_varint
from worker.engine.packing.tensors import RAW, Array, pack_encoding, pack_plain, pack_pool
from worker.engine.programs.export_onnx import make_onnx
from worker.engine.programs.program import Program

_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def export_packed(program: Program, path: Path) -> None:
    """Write `path`; the same bytes for the same program."""
    model = make_onnx(program, keep_weights=True)
    initializers = {each.name: each for each in model.graph.initializer}
    unknown = sorted({each.data_type for each in initializers.values()} - load.DTYPES.keys())
    if unknown:
        names = [TensorProto.DataType.Name(kind) for kind in unknown]
        raise ExportFailed(f"a packed file cannot hold weights of type {names}", code="packed_export_failed")
    arrays = {name: numpy_helper.to_array(each) for name, each in initializers.items()}
    encodings, aliases = _match_names(program, arrays)
    del model.graph.initializer[:]
    _shorten(model, keep=arrays)

    codings, payloads = [], []
    for name, array in arrays.items():
        coding, payload = pack_encoding(encodings[name]) if name in encodings else pack_plain(array)
        codings.append(coding)
        payloads.append(payload)
    kinds = [each.data_type for each in initializers.values()]
    raw = [(kind, array) for kind, array, coding in zip(kinds, arrays.values(), codings, strict=True) if coding == RAW]
    pools = [pack_pool(array for kind, array in raw if kind == each) for each in sorted({kind for kind, _ in raw})]
    graph = model.SerializeToString(deterministic=True)
    ranks = [array.ndim for array in arrays.values()]
    numbers = list(arrays)
    header = b"".join(
        (
            pack_varint(len(graph)),
            graph,
            _pack_text(arrays),
            bytes(kinds),
            bytes(codings),
            bytes(ranks),
            *(pack_varint(size) for array in arrays.values() for size in array.shape),
            _pack_text(aliases),
            *(pack_varint(numbers.index(name)) for name in aliases.values()),
        )
    )
    compressed = _compress(header)
    start = load.MAGIC + pack_varint(len(header)) + pack_varint(len(compressed)) + compressed
    data = start + b"".join(pools) + b"".join(payloads)
    needed = sum(array.nbytes for array in arrays.values())
    if max(needed, len(header)) > load.MAX_EXPANSION * len(data):
        raise ExportFailed(
            f"{needed} bytes of weights would be packed into {len(data)}; a reader refuses more than "
            f"{load.MAX_EXPANSION} times",
            code="packed_export_failed",
        )
    path.write_bytes(data)


def _match_names(program: Program, arrays: dict[str, Array]) -> tuple[dict[str, Encoding], dict[str, str]]:
    """Return the encodings by the names in the graph, and the tied names that the graph does not use."""
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    by_tensor = {id(parameters[name]): encoding for name, encoding in program.encodings.items()}
    encodings: dict[str, Encoding] = {}
    known: dict[int, str] = {}
    for name, array in arrays.items():
        if name in parameters:
            known.setdefault(id(parameters[name]), name)
            encoding = by_tensor.get(id(parameters[name]))
            if encoding is not None:
                assert np.array_equal(array, encoding.decode().numpy()), f"{name} is not what its encoding holds"
                encodings[name] = encoding
    aliases = {
        name: known[id(parameter)]
        for name, parameter in parameters.items()
        if name not in arrays and id(parameter) in known
    }
    return encodings, aliases


def _shorten(model: onnx.ModelProto, keep: Iterable[str]) -> None:
    """Remove what no runtime needs: names of nodes, and of values that are neither weights, inputs nor outputs."""
    graph = model.graph
    del graph.value_info[:]
    for node in graph.node:
        node.name = ""
    if any(attribute.type in _BODIES for node in graph.node for attribute in node.attribute):
        # A body refers to the values around it by name.
        return
    kept = {"", *keep, *(each.name for each in (*graph.input, *graph.output))}
    unused = (name for name in map("{:x}".format, itertools.count()) if name not in kept)
    names = {name: name for name in kept}
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names[name] if name in names else names.setdefault(name, next(unused)) for name in side]


def _pack_text(names: Iterable[str]) -> bytes:
    text = "\n".join(names).encode()
    return pack_varint(len(text)) + text


def _compress(data: bytes) -> bytes:
    # Bytes of protobuf have no alignment, hence pb=0.
    return lzma.compress(
        data, lzma.FORMAT_RAW, filters=[{**load.LZMA_FILTER, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]
    )
