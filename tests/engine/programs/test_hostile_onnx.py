"""ONNX files that lie, or that another program altered: each is refused with a reason, quickly and in little memory."""

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.engine.programs.onnx_files import make_onnx_file
from worker.engine.errors import ModelRejected
from worker.engine.programs.intake import open_program
from worker.engine.programs.onnx_import import wire
from worker.engine.programs.onnx_import.open import _identifier, _unique
from worker.engine.programs.onnx_import.read import MAX_NODES

torch.set_num_threads(1)
node = helper.make_node
_RANDOM = np.random.default_rng(0)
TENSORS = {
    "fc.weight": _RANDOM.standard_normal((6, 4)).astype(np.float32), "fc.bias": np.ones(4, np.float32),
    "shape": np.array([-1, 2, 2]),
}  # fmt: skip
NODES = [
    node("MatMul", ["x", "fc.weight"], ["p"], name="/fc/MatMul"),
    node("Add", ["p", "fc.bias"], ["h"]),
    node("Relu", ["h"], ["r"]),
    node("Reshape", ["r", "shape"], ["y"]),
]


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return make_onnx_file(tmp_path / "valid.onnx", NODES, {"x": ("n", 6)}, TENSORS)


def refuse(path: Path) -> ModelRejected:
    with pytest.raises(ModelRejected) as caught:
        open_program(path, path.parent, "onnx")
    assert caught.value.detail.isascii()
    assert caught.value.fix
    return caught.value


def test_the_file_that_is_altered_is_a_valid_one(valid: Path) -> None:
    assert open_program(valid, valid.parent, "onnx").signature.outputs[0].shape == ("batch", 2, 2)


def test_a_file_that_is_cut_short_is_refused(valid: Path, tmp_path: Path) -> None:
    data = valid.read_bytes()
    for size in range(1, len(data), 7):
        (tmp_path / "cut.onnx").write_bytes(data[:size])
        assert refuse(tmp_path / "cut.onnx").code


def test_altered_bytes_are_refused_or_harmless(valid: Path, tmp_path: Path) -> None:
    data, generator = valid.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        altered = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            altered[generator.randrange(len(altered))] = generator.randrange(256)
        path = tmp_path / "altered.onnx"
        path.write_bytes(altered)
        try:
            open_program(path, tmp_path, "onnx")
        except ModelRejected:
            refused += 1
    assert refused > 50


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def _rename(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].name = model.graph.initializer[0].name


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "r"


def _made_twice(model: onnx.ModelProto) -> None:
    model.graph.node[2].output[0] = "p"


def _branch(model: onnx.ModelProto) -> None:
    body = helper.make_graph([node("Relu", ["h"], ["z"])], "body", [], [helper.make_empty_tensor_value_info("z")])
    model.graph.node[2].CopyFrom(node("If", ["x"], ["r"], then_branch=body, else_branch=body))


def _set(path: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        holder: Any = model
        *parts, last = path.split(".")
        for part in parts:
            holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
        if isinstance(value, list):
            del getattr(holder, last)[:]
            getattr(holder, last).extend(value)
        else:
            setattr(holder, last, value)

    return change


def _weight(array: Any) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "fc.weight"))


NAN = np.full((6, 4), np.nan, np.float32)
CHANGES: list[tuple[str, Callable[[onnx.ModelProto], object], str]] = [
    ("external data", _external, "external_data"),
    ("two tensors of one name", _rename, "bad_graph"),
    ("a cycle", _cycle, "bad_graph"),
    ("a value made twice", _made_twice, "bad_graph"),
    ("a branch", _branch, "unsupported_operator"),
    ("an unknown operator", _set("graph.node.2.op_type", "Reluu"), "unsupported_operator"),
    ("an operator's name that is none", _set("graph.node.2.op_type", "os.system"), "unsupported_operator"),
    ("a domain", _set("graph.node.2.domain", "com.microsoft"), "unsupported_operator"),
    ("a quantized operator", _set("graph.node.2.op_type", "DequantizeLinear"), "quantized_model"),
    ("a missing value", _set("graph.node.2.input", ["nothing"]), "bad_graph"),
    ("a missing argument", _set("graph.node.3.input", ["r"]), "bad_graph"),
    ("a missing output", _set("graph.output.0.name", "nothing"), "bad_graph"),
    ("more numbers than bytes", _set("graph.initializer.0.dims", [60, 4]), "onnx_damaged"),
    ("huge sizes", _set("graph.initializer.0.dims", [2**62, 2**62]), "onnx_damaged"),
    ("negative sizes", _set("graph.initializer.0.dims", [-6, -4]), "shape_bomb"),
    ("many axes", _set("graph.initializer.0.dims", [1] * 100), "shape_bomb"),
    ("strings", _set("graph.initializer.0.data_type", TensorProto.STRING), "unsupported_dtype"),
    ("no type", _set("graph.initializer.0.data_type", 99), "unsupported_dtype"),
    ("a huge input", _set("graph.input.0.type.tensor_type.shape.dim.1.dim_value", 2**40), "shape_bomb"),
    ("an input of strings", _set("graph.input.0.type.tensor_type.elem_type", TensorProto.STRING), "unsupported_dtype"),
    ("another opset", _set("opset_import.0.version", 99), "unsupported_opset"),
    ("nodes without end", lambda model: [model.graph.node.add(op_type="Relu") for _ in range(MAX_NODES + 1)],
     "onnx_too_large"),
    ("tensors without end", lambda model: [model.graph.initializer.add(name=f"t{i}") for i in range(21_000)],
     "onnx_too_large"),
    ("no nodes", lambda model: model.graph.ClearField("node"), "onnx_damaged"),
    ("no output", lambda model: model.graph.ClearField("output"), "no_output"),
    ("functions", lambda model: model.functions.add(), "unsupported_onnx"),
    ("sparse tensors", lambda model: model.graph.sparse_initializer.add(), "unsupported_onnx"),
    ("a name of control characters", _set("graph.initializer.0.name", "a\n\x1b[31m"), "bad_name"),
    ("a weight that is NaN", _weight(NAN), "nonfinite_weight"),
    ("a weight that is infinite", _weight(np.full((6, 4), np.inf, np.float32)), "nonfinite_weight"),
    ("half precision", _weight(np.ones((6, 4), np.float16)), "unsupported_dtype"),
    ("a weight of another size", _weight(np.ones((7, 4), np.float32)), "graph_not_runnable"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code"), [each[1:] for each in CHANGES], ids=[each[0] for each in CHANGES])
def test_files_that_lie_are_refused(
    change: Callable[[onnx.ModelProto], None], code: str, valid: Path, tmp_path: Path
) -> None:
    model = onnx.load(valid)
    change(model)
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    assert refuse(tmp_path / "changed.onnx").code == code


HUGE = np.array([2**20, 2**20])
BOMBS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a constant": ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])], {"s": HUGE}),
    "expanded": ([node("Expand", ["o", "s"], ["c"]), node("Add", ["x", "c"], ["y"])],
                 {"s": HUGE, "o": np.ones((1, 1), np.float32)}),
    "expanded input": ([node("Unsqueeze", ["x", "z"], ["u"]), node("Expand", ["u", "s"], ["y"])],
                       {"s": np.array([2**30, 1, 1, 1]), "z": np.array([0])}),
    "tiled": ([node("Tile", ["x", "s"], ["y"])], {"s": HUGE}),
    "padded": ([node("Pad", ["x", "s"], ["y"])], {"s": np.array([0, 0, 2**28, 2**28])}),
    "a range": ([node("Range", ["a", "b", "o"], ["c"]), node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
                 node("Add", ["x", "f"], ["y"])],
                {"a": np.array(0), "b": np.array(2**45), "o": np.array(1)}),
    "an outer product": ([node("MatMul", ["p", "q"], ["c"]), node("Add", ["x", "c"], ["y"])],
                         {"p": np.ones((2**18, 1), np.float32), "q": np.ones((1, 2**18), np.float32)}),
    "one growing": ([node("Concat", ["c"] * 9000, ["d"], axis=0), node("Concat", ["d"] * 9000, ["e"], axis=0),
                     node("Add", ["x", "e"], ["y"])], {"c": np.ones((999, 2), np.int64)}),
    "enlarged": ([node("Unsqueeze", ["x", "z"], ["u"]), node("Resize", ["u", "", "t"], ["y"])],
                 {"z": np.array([0, 1]), "t": np.array([1, 1, 1e5, 1e5], np.float32)}),
    "a kernel": ([node("Unsqueeze", ["x", "z"], ["u"]), node("MaxPool", ["u"], ["y"], kernel_shape=[3, 3],
                                                             pads=[2**19] * 4)], {"z": np.array([0, 1])}),
    "many at once": ([*(node("Tile", ["x", "s"], [f"t{i}"]) for i in range(9)),
                      node("Sum", [f"t{i}" for i in range(9)], ["y"])], {"s": np.array([1, 2**28])}),
    "a large constant": ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])],
                         {"s": np.array([2, 2**27])}),
    "a folded convolution": ([node("ConstantOfShape", ["a"], ["A"]), node("ConstantOfShape", ["b"], ["B"]),
                              node("Conv", ["A", "B"], ["c"]), node("ReduceSum", ["c"], ["d"], keepdims=0),
                              node("Add", ["x", "d"], ["y"])],
                             {"a": np.array([1, 1, 3000, 3000]), "b": np.array([1, 1, 1500, 1500])}),
    "a folded pool": ([node("ConstantOfShape", ["a"], ["A"]), node("MaxPool", ["A"], ["c"], kernel_shape=[1500, 1500]),
                       node("ReduceSum", ["c"], ["d"], keepdims=0), node("Add", ["x", "d"], ["y"])],
                      {"a": np.array([1, 1, 3000, 3000])}),
    "folded products": ([node("ConstantOfShape", ["a"], ["m0"]),
                         *(node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]) for i in range(5)),
                         node("ReduceSum", ["m5"], ["d"], keepdims=0), node("Add", ["x", "d"], ["y"])],
                        {"a": np.array([3000, 3000])}),
    "a pool": ([node("Reshape", ["x", "t"], ["u"]), node("Expand", ["u", "s"], ["e"]),
                node("MaxPool", ["e"], ["c"], kernel_shape=[1500, 1500]), node("ReduceSum", ["c"], ["y"], keepdims=0)],
               {"t": np.array([2, 1, 1, 1]), "s": np.array([2, 1, 3000, 3000])}),
    "products": ([node("Reshape", ["x", "t"], ["r"]), node("Expand", ["r", "s"], ["m0"]),
                  *(node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]) for i in range(9)),
                  node("ReduceSum", ["m9"], ["y"], keepdims=0)],
                 {"s": np.array([4000, 4000]), "t": np.array([2, 1, 1])}),
    "a division by zero": ([node("Div", ["x", "z"], ["d"]), node("Cast", ["d"], ["i"], to=TensorProto.INT64),
                            node("Reshape", ["x", "i"], ["y"])], {"z": np.zeros(1, np.float32)}),
    "a text for a number": ([node("Softmax", ["x"], ["y"], axis="first")], {}),
    "numbers for a text": ([node("Resize", ["x", "", "t"], ["y"], mode=[1, 2])], {"t": np.ones(2, np.float32)}),
    "no kernel": ([node("Conv", ["x", "x"], ["y"])], {}),
    "groups of none": ([node("Conv", ["x", "w"], ["y"], group=0)], {"w": np.ones((2, 2, 1), np.float32)}),
}  # fmt: skip


NO_BOMBS = ("a division by zero", "a text for a number", "numbers for a text", "no kernel", "groups of none")


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_do_not_ask_for_large_memory(name: str, tmp_path: Path) -> None:
    nodes, tensors = BOMBS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = refuse(make_onnx_file(tmp_path / "bomb.onnx", nodes, {"x": (1, 2)}, tensors)).code
    # For another reason than that it would not fit, only what is no bomb.
    assert code in ("shape_bomb", "tensor_too_large", "too_much_work") or name in NO_BOMBS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "a GiB more than before"


@pytest.mark.parametrize(
    "kind", ["..", "nested ..", "absolute", "/proc", "link", "linked folder", "hard link", "plain"]
)
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_external_data_is_refused_wherever_it_points(kind: str, place: str, valid: Path, tmp_path: Path) -> None:
    """Also to a file that lies beside it: an upload is one file."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret!!" * 12)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(secret)
    (tmp_path / "linked").symlink_to(tmp_path)
    os.link(secret, tmp_path / "folder" / "hard")
    location = {
        "..": "../secret", "nested ..": "a/../../secret", "absolute": str(secret), "/proc": "/proc/self/environ",
        "link": "link", "linked folder": "../linked/secret", "hard link": "hard", "plain": "data.bin",
    }[kind]  # fmt: skip
    (tmp_path / "folder" / "data.bin").write_bytes(bytes(96))
    model = onnx.load(valid)
    tensor = model.graph.initializer[0]
    if place == "constant":
        added = model.graph.node.add(op_type="Constant", output=["c"])
        added.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        tensor = added.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = tmp_path / "folder" / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    error = refuse(path)
    assert error.code == "external_data"
    assert "secret!!" not in error.detail
    tensor.data_location = TensorProto.DEFAULT
    path.write_bytes(model.SerializeToString())
    assert refuse(path).code == "external_data"


def wired(number: int, content: bytes) -> bytes:
    """Return a field of a message, as bytes."""
    length, size = len(content), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


HEAD = b"\x08\x08\x12\x07pytorch"
WIRES = {
    "many empty nodes": HEAD + wired(7, b"\x0a\0" * 12_000),
    "many empty attributes of one node": HEAD + wired(7, wired(1, b"\x2a\0" * 12_000)),
    "much metadata": HEAD + b"\x72\0" * 12_000,
    "many names": HEAD + wired(7, wired(1, b"\x0a\1a" * 12_000)),
}


@pytest.mark.parametrize("name", WIRES)
def test_bytes_that_would_grow_when_parsed_are_counted_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_FIELDS", 10_000)
    (tmp_path / "a.onnx").write_bytes(WIRES[name])
    error = refuse(tmp_path / "a.onnx")
    assert error.code == "onnx_too_large"
    assert "fields" in error.detail


@pytest.mark.parametrize(
    "data", [HEAD + b"\x0b\x0c", HEAD + b"\x3a\xff\xff\x03", HEAD + b"\x3a" + b"\xff" * 20, HEAD + wired(7, b"\x0a\5a")]
)
def test_bytes_that_are_no_message_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    assert refuse(tmp_path / "a.onnx").code == "onnx_damaged"


def test_thousands_of_names_that_become_one_stay_apart() -> None:
    names = [f"\u00e9{'.' * index}" for index in range(2000)]
    assert len(set(_unique([_identifier(name) for name in names]))) == len(names)
    started = time.process_time()
    assert len(_unique(["a"] * 20_000)) == 20_000
    assert time.process_time() - started < 5
