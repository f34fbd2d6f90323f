"""Strict reading of an ONNX file: every field that is used is checked, everything else is refused or left behind."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto

from worker.engine.programs.onnx_import.tensors import MAX_RANK, NUMPY_TYPES, Array, check_dtype, read_tensor
from worker.engine.programs.onnx_import.wire import Damaged, TooLarge, check_wire
from worker.engine.programs.rejections import reject, shown

MAX_FILE_BYTES = 2**31 - 1
MAX_NODES = 50_000
"""torch.export needs some milliseconds for each: the deadline of a check comes first, but not for a model."""
MAX_TENSORS = 20_000
OPSETS = range(9, 26)
"""Versions of the operators of ai.onnx that are understood."""
_MAX_NAME, _MAX_VALUES, _MAX_ELEMENTS = 1000, 10_000, 2**27
_TEXT = re.compile(r"[\x20-\x7e]*")
_DOMAINS = ("", "ai.onnx")
_QUANTIZED = re.compile(r"(QLinear|Quantize|Dequantize|DynamicQuantize|MatMulInteger|ConvInteger)")
EXPORT_FIX = (
    "Export the float model in one self-contained file with plain operators, for example "
    'torch.onnx.export(model.eval(), inputs, "model.onnx", dynamo=True, external_data=False), or export the live model '
    "with torch.export and upload the .pt2."
)


@dataclass(frozen=True)
class Node:
    """One call of an operator of ai.onnx."""

    op: str
    name: str
    inputs: tuple[str, ...]
    """Names of values; "" where an optional one is left out."""
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    """Numbers, ASCII texts, tuples of them, and arrays."""
    scope: str = ""
    """Path of the module that made the call, where torch's exporter noted it."""


@dataclass(frozen=True)
class Value:
    """An input or output of the graph. A size that may vary is a text, "" where it has no name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass
class OnnxGraph:
    """What a file says: nodes in an order in which they can run, tensors by name."""

    opset: int
    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    tensors: dict[str, Array] = field(default_factory=dict)
    size_bytes: int = 0


def read_onnx(path: Path) -> OnnxGraph:
    """Read the file at `path`; raises ModelRejected."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        reject("onnx_too_large", f"The file has {size} bytes; an ONNX file has less than {MAX_FILE_BYTES}.", EXPORT_FIX)
    model = _parse(path.read_bytes())
    if not model.HasField("graph") or not model.graph.node:
        _refuse("onnx_damaged", "The file holds no graph with nodes.")
    if model.functions or model.training_info:
        _refuse("unsupported_onnx", "The file defines functions or training steps of its own.")
    graph = model.graph
    if graph.sparse_initializer:
        _refuse("unsupported_onnx", "The file has sparse tensors.")
    if graph.quantization_annotation:
        _refuse("quantized_model", "The file is annotated as quantized; its weights cannot be trained.")
    if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_TENSORS:
        _refuse(
            "onnx_too_large",
            f"The graph has {len(graph.node)} nodes and {len(graph.initializer)} tensors; at most {MAX_NODES} and "
            f"{MAX_TENSORS} are taken.",
        )
    read = OnnxGraph(_read_opset(model), [], [], [], size_bytes=size)
    for tensor in graph.initializer:
        name = _name(tensor.name, "a tensor")
        if name in read.tensors:
            _refuse("bad_graph", f"There are two tensors named {shown(name)}.")
        read.tensors[name] = read_tensor(tensor, f"the tensor {shown(name)}")
    # Old files list their tensors among the inputs, too.
    read.inputs = [_read_value(item, "input") for item in graph.input if item.name not in read.tensors]
    read.outputs = [_read_value(item, "output") for item in graph.output]
    if not read.inputs or not read.outputs:
        _refuse("no_input" if not read.inputs else "no_output", "The graph takes or returns no tensor.")
    if len(read.inputs) > _MAX_VALUES or len(read.outputs) > _MAX_VALUES:
        _refuse("onnx_too_large", f"The graph has more than {_MAX_VALUES} inputs or outputs.")
    read.nodes = _order([_read_node(node, index) for index, node in enumerate(graph.node)], read)
    return read


def _parse(data: bytes) -> onnx.ModelProto:
    try:
        check_wire(data)
    except TooLarge as error:
        _refuse("onnx_too_large", f"The file of {len(data)} bytes holds {error}.")
    except Damaged as error:
        _refuse("onnx_damaged", f"The file is no ONNX model, or it is cut short: {error}.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        # Protobuf's own errors are many, and say nothing about where.
        _refuse("onnx_damaged", f"The file is no ONNX model, or it is cut short: {type(error).__name__}.")
    return model


def _refuse(code: str, detail: str) -> Any:
    reject(code, detail, EXPORT_FIX)


def _read_opset(model: onnx.ModelProto) -> int:
    versions = [(entry.domain, entry.version) for entry in model.opset_import]
    found = [version for domain, version in versions if domain in _DOMAINS]
    # Others may be imported and not used; the nodes are looked at one by one.
    if len(found) != 1 or found[0] not in OPSETS:
        _refuse(
            "unsupported_opset",
            f"The file was written for version {shown(found)} of ONNX's operators; taken are {OPSETS.start} to "
            f"{OPSETS.stop - 1}.",
        )
    return int(found[0])


def _name(value: str, what: str, *, empty: bool = False) -> str:
    # Text that is no UTF-8 arrives as bytes.
    if not isinstance(value, str) or len(value) > _MAX_NAME or (not value and not empty) or not value.isprintable():
        _refuse("bad_name", f"The name {shown(value)} of {what} is empty, too long or not printable.")
    return value


def _read_value(value: onnx.ValueInfoProto, what: str) -> Value:
    name = _name(value.name, f"an {what}")
    if value.type.WhichOneof("value") != "tensor_type":
        _refuse("unsupported_input", f"The {what} {shown(name)} is no tensor.")
    kind = value.type.tensor_type
    dtype = check_dtype(kind.elem_type, f"the {what} {shown(name)}")
    if not kind.HasField("shape"):
        return Value(name, dtype, None)
    if len(kind.shape.dim) > MAX_RANK:
        _refuse("shape_bomb", f"The {what} {shown(name)} has {len(kind.shape.dim)} axes; at most {MAX_RANK} are taken.")
    sizes: list[int | str] = []
    for dim in kind.shape.dim:
        if dim.WhichOneof("value") == "dim_value" and dim.dim_value > 0:
            sizes.append(int(dim.dim_value))
        else:
            sizes.append(_name(dim.dim_param, f"a size of {shown(name)}", empty=True))
    if math.prod(size for size in sizes if isinstance(size, int)) > _MAX_ELEMENTS:
        _refuse("shape_bomb", f"The {what} {shown(name)} has the shape {shown(sizes)}.")
    return Value(name, dtype, tuple(sizes))


def _read_node(node: onnx.NodeProto, index: int) -> Node:
    op = _name(node.op_type, "an operator")
    where = f"node {index} ({shown(node.name)}, operator {shown(op)})"
    if _QUANTIZED.match(op):
        reject(
            "quantized_model",
            f"The {where} is of a quantized model; its weights cannot be trained or measured.",
            "Upload the original float model; Pare quantizes it.",
        )
    if node.domain not in _DOMAINS or not re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,63}", op):
        _refuse("unsupported_operator", f"The {where} is of the domain {shown(node.domain)}; only ai.onnx is known.")
    if len(node.input) > _MAX_VALUES or not 1 <= len(node.output) <= _MAX_VALUES:
        _refuse("bad_graph", f"The {where} has {len(node.input)} inputs and {len(node.output)} outputs.")
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        key = _name(attribute.name, f"an attribute of {where}")
        if key in attributes:
            _refuse("bad_graph", f"The {where} has two attributes {shown(key)}.")
        attributes[key] = _read_attribute(attribute, f"{where}: the attribute {shown(key)}")
    return Node(
        op,
        _name(node.name, where, empty=True),
        tuple(_name(name, f"an input of {where}", empty=True) for name in node.input),
        tuple(_name(name, f"an output of {where}", empty=True) for name in node.output),
        attributes,
        _read_scope(node),
    )


def _read_scope(node: onnx.NodeProto) -> str:
    # torch's exporter notes a list of paths as text: "['', 'blocks', 'blocks.0.fc', 'linear']".
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes" and isinstance(entry.value, str):
            paths = re.findall(r"'([A-Za-z0-9_.]{0,300})'", entry.value[:10_000])
            return paths[-2] if len(paths) > 1 else ""
    return ""


def _read_attribute(attribute: onnx.AttributeProto, where: str) -> Any:
    kind = attribute.type
    if attribute.ref_attr_name:
        _refuse("unsupported_onnx", f"The {where} refers to an argument of a function.")
    if kind == AttributeProto.FLOAT:
        return float(attribute.f)
    if kind == AttributeProto.INT:
        return int(attribute.i)
    if kind == AttributeProto.STRING:
        return _text(attribute.s, where)
    if kind == AttributeProto.TENSOR:
        return read_tensor(attribute.t, where)
    if kind in (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS):
        values = attribute.floats or attribute.ints or attribute.strings
        if len(values) > _MAX_VALUES:
            _refuse("bad_graph", f"The {where} has {len(values)} values; at most {_MAX_VALUES} are taken.")
        if kind == AttributeProto.STRINGS:
            return tuple(_text(value, where) for value in attribute.strings)
        return tuple(attribute.floats) if kind == AttributeProto.FLOATS else tuple(attribute.ints)
    if kind in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        return reject(
            "unsupported_operator",
            f"The {where} is a graph of its own (If, Loop, Scan): what runs depends on values.",
            "Export the model so that it runs the same operators for every input; torch.export says where it does not.",
        )
    return _refuse("unsupported_onnx", f"The {where} is of a kind that no plain operator has.")


def _text(value: bytes, where: str) -> str:
    text = value.decode("ascii", "replace")
    if len(text) > _MAX_NAME or not _TEXT.fullmatch(text):
        _refuse("bad_graph", f"The {where} is no plain text.")
    return text


def _order(nodes: list[Node], graph: OnnxGraph) -> list[Node]:
    """Return the nodes sorted so that each runs after what it reads; each value is made once."""
    known = {value.name for value in graph.inputs}
    if len(known) != len(graph.inputs):
        _refuse("bad_graph", "Two inputs have the same name.")
    known |= graph.tensors.keys()
    makers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.outputs:
            if name and (name in known or name in makers):
                _refuse("bad_graph", f"The value {shown(name)} is made twice.")
            if name:
                makers[name] = index
    waits = [len({name for name in node.inputs if name in makers}) for node in nodes]
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for name in {name for name in node.inputs if name}:
            if name in makers:
                readers.setdefault(name, []).append(index)
            elif name not in known:
                _refuse("bad_graph", f"The operator {node.op} reads {shown(name)}, which nothing makes.")
    ready = [index for index, count in enumerate(waits) if count == 0]
    ordered: list[Node] = []
    while ready:
        node = nodes[ready.pop()]
        ordered.append(node)
        for name in node.outputs:
            for index in readers.get(name, ()):
                waits[index] -= 1
                if waits[index] == 0:
                    ready.append(index)
    if len(ordered) != len(nodes):
        _refuse("bad_graph", f"{len(nodes) - len(ordered)} nodes wait for each other: the graph has a cycle.")
    for value in graph.outputs:
        if value.name not in makers and value.name not in known:
            _refuse("bad_graph", f"The output {shown(value.name)} is made by nothing.")
    if len({value.name for value in graph.outputs}) != len(graph.outputs):
        _refuse("bad_graph", "Two outputs have the same name.")
    # The file's own order is kept where it is one; it is the order in which the model's author thinks.
    return nodes if _in_order(nodes, makers) else ordered


def _in_order(nodes: list[Node], makers: dict[str, int]) -> bool:
    return all(makers.get(name, -1) < index for index, node in enumerate(nodes) for name in node.inputs if name)


def write_onnx(graph: OnnxGraph) -> bytes:
    """Return the graph as a file written anew from what was checked, which ONNX Runtime may read."""
    nodes = [
        onnx.helper.make_node(
            node.op,
            list(node.inputs),
            list(node.outputs),
            **{
                key: onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
                for key, value in node.attributes.items()
                if isinstance(value, np.ndarray) or value != ()
            },
        )
        for node in graph.nodes
    ]
    types = {name: number for number, name in NUMPY_TYPES.items()}

    def info(value: Value) -> onnx.ValueInfoProto:
        shape = None if value.shape is None else [size or None for size in value.shape]
        return onnx.helper.make_tensor_value_info(value.name, types[value.dtype], shape)

    body = onnx.helper.make_graph(
        nodes,
        "model",
        [info(value) for value in graph.inputs],
        [info(Value(value.name, value.dtype, None)) for value in graph.outputs],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
         for name, array in graph.tensors.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", graph.opset)])
    model.ir_version = 8 if graph.opset < 21 else 10 if graph.opset < 24 else 11
    serialized: bytes = model.SerializeToString()
    return serialized
