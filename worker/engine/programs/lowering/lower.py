"""Replacing the floats of encoded weights in an ONNX model: by integer operators, row lookups, or stored codes."""

import hashlib
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from worker.engine.packing.encodings import Encoding, Grouped
from worker.engine.programs.lowering.integers import ACCURACY_LEVEL, has_integer_operator, make_operands
from worker.engine.programs.lowering.storage import BFLOAT16, Storage, store
from worker.engine.programs.program import Program

DOMAIN = "com.microsoft"


def can_lower(program: Program) -> bool:
    """Whether any encoding of the program has another form in ONNX than plain floats."""
    return any(store(encoding) is not None for encoding in program.encodings.values())


def lower(model: onnx.ModelProto, program: Program) -> None:
    """Rewrite in place a model whose initializers have the program's parameter names (`make_onnx(keep_weights=True)`).

    A linear layer with grouped codes becomes MatMulNBits, an embedding a lookup of codes that are decoded row by row;
    every other use of an encoded weight reads floats that the runtime decodes once, when it loads the file.
    """
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    by_tensor: dict[int, Encoding] = {id(parameters[name]): each for name, each in program.encodings.items()}
    lowering = _Lowering(model)
    for name in [each.name for each in model.graph.initializer]:
        tensor: Tensor | None = parameters.get(name)
        encoding = by_tensor.get(id(tensor)) if tensor is not None else None
        stored = store(encoding) if encoding is not None else None
        if encoding is not None and stored is not None:
            lowering.replace(name, encoding, stored)
    lowering.finish()


class _Lowering:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._graph = model.graph
        self._nodes: list[NodeProto] = list(model.graph.node)
        self._first: list[NodeProto] = []
        """Decoding of whole weights: reads initializers only."""
        self._before: dict[int, list[NodeProto]] = {}
        """id of a node -> what takes its place."""
        self._initializers = {each.name: each for each in model.graph.initializer}
        self._removed: set[int] = set()

    def replace(self, name: str, encoding: Encoding, stored: Storage) -> None:
        """Replace every use of one initializer."""
        outputs = {each.name for each in self._graph.output}
        for node in [each for each in self._nodes if id(each) not in self._before and name in each.input]:
            if node.op_type == "Gather" and node.input[0] == name and _attribute(node, "axis", 0) == 0:
                self._look_up(node, name, stored)
            elif isinstance(encoding, Grouped) and has_integer_operator(encoding):
                if node.op_type == "Gemm" and node.input[1] == name and _is_plain_gemm(node):
                    self._multiply(node, node.input[0], name, encoding, node.input[2] if len(node.input) > 2 else "")
                elif node.op_type == "Transpose" and list(_attribute(node, "perm", [])) == [1, 0]:
                    users = [each for each in self._nodes if node.output[0] in each.input]
                    products = [each for each in users if each.op_type == "MatMul" and each.input[1] == node.output[0]]
                    for product in products:
                        self._multiply(product, product.input[0], name, encoding, "")
                    if len(products) == len(users) and node.output[0] not in outputs | _read_inside(self._nodes):
                        self._before[id(node)] = []
        kept = [node for node in self._nodes if id(node) not in self._before]
        if name in outputs or name in _read_inside(kept) or any(name in node.input for node in kept):
            self._decode_whole(name, stored)
        del self._initializers[name]

    def finish(self) -> None:
        """Put everything into the model."""
        nodes = [new for node in self._nodes for new in self._before.get(id(node), [node])]
        read = {name for node in (*self._first, *nodes) for name in node.input} | _read_inside(nodes)
        read |= {each.name for each in self._graph.output}
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend((*self._first, *nodes))
        self._graph.initializer.extend(each for name, each in self._initializers.items() if name in read)
        if any(node.domain == DOMAIN for node in nodes):
            self._model.opset_import.append(helper.make_opsetid(DOMAIN, 1))

    def _multiply(self, node: NodeProto, source: str, name: str, encoding: Grouped, bias: str) -> None:
        operands = make_operands(encoding)
        inputs = [source, self._store(f"{name}_codes", operands.codes)]
        inputs.append(self._store(f"{name}_flat_scales", operands.scales.reshape(-1)))
        zero_points = operands.packed_zero_points
        if zero_points is not None:
            inputs.append(self._store(f"{name}_packed_zero_points", zero_points.reshape(-1)))
        output = node.output[0]
        product = helper.make_node(
            "MatMulNBits", inputs, [f"{output}_product" if bias else output], name=f"{output}_MatMulNBits",
            domain=DOMAIN, K=operands.columns, N=len(operands.codes), bits=operands.bits,
            block_size=operands.block_size, accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip
        self._before[id(node)] = [product]
        if bias:
            add = helper.make_node("Add", [product.output[0], bias], [output], name=f"{output}_Add")
            self._before[id(node)].append(add)

    def _look_up(self, node: NodeProto, name: str, stored: Storage) -> None:
        output, index = node.output[0], node.input[1]
        written: list[NodeProto] = []
        write = self._writer(written, output)
        names = {
            suffix: write("Gather", self._store(f"{name}_{suffix}", array, suffix), index, axis=0)
            for suffix, array in stored.arrays.items()
        }
        rows = stored.decode(names, write, self._constant)
        shape = numpy_helper.to_array(self._initializers[name]).shape
        whole = write("Concat", write("Shape", index), self._constant(np.array([stored.width], np.int64)), axis=0)
        rows = write("Reshape", rows, whole)
        tail = int(np.prod(shape[1:]))
        if stored.width != tail:
            rows = self._cut(write, rows, tail)
        if len(shape) != 2:
            sizes = self._constant(np.array(shape[1:], np.int64))
            rows = write("Reshape", rows, write("Concat", write("Shape", index), sizes, axis=0))
        written.append(helper.make_node("Identity", [rows], [output], name=f"{output}_Identity"))
        self._before[id(node)] = written

    def _decode_whole(self, name: str, stored: Storage) -> None:
        write = self._writer(self._first, name)
        names = {suffix: self._store(f"{name}_{suffix}", array, suffix) for suffix, array in stored.arrays.items()}
        values = stored.decode(names, write, self._constant)
        shape = numpy_helper.to_array(self._initializers[name]).shape
        tail = int(np.prod(shape[1:]))
        if stored.width != tail:
            values = write("Reshape", values, self._constant(np.array([shape[0], stored.width], np.int64)))
            values = self._cut(write, values, tail)
        self._first.append(
            helper.make_node(
                "Reshape", [values, self._constant(np.array(shape, np.int64))], [name], name=f"{name}_decoded"
            )
        )

    def _cut(self, write: Any, value: str, size: int) -> str:
        bounds = (self._constant(np.array([each], np.int64)) for each in (0, size, -1))
        return str(write("Slice", value, *bounds))

    def _writer(self, nodes: list[NodeProto], prefix: str) -> Any:
        def write(operator: str, *inputs: str, **attributes: Any) -> str:
            output = f"{prefix}_decode_{len(nodes)}"
            nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
            return output

        return write

    def _store(self, name: str, array: NDArray[Any], suffix: str = "") -> str:
        if name not in self._initializers:
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            if suffix == BFLOAT16:
                tensor.data_type = TensorProto.BFLOAT16
            self._initializers[name] = tensor
        return name

    def _constant(self, array: NDArray[Any]) -> str:
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        return self._store(f"constant_{hashlib.sha256(content).hexdigest()[:16]}", array)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _is_plain_gemm(node: NodeProto) -> bool:
    given = {name: _attribute(node, name, default) for name, default in _GEMM.items()}
    return given == {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}


_GEMM = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}


def _read_inside(nodes: list[NodeProto]) -> set[str]:
    """Return what the bodies of conditions and loops read."""
    found: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for body in bodies:
                found |= {name for each in body.node for name in each.input} | _read_inside(list(body.node))
                found |= {each.name for each in body.output}
    return found
