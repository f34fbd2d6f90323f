"""ONNX's operators one by one, and the idioms of exporters: each computes what ONNX Runtime computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.engine.programs.onnx_files import layers_of, make_onnx_file, open_checked, run_onnx
from worker.engine.errors import ModelRejected
from worker.engine.programs.intake import open_program
from worker.engine.programs.onnx_import.call import Call
from worker.engine.programs.onnx_import.constants import Constants
from worker.engine.programs.onnx_import.interpreter import Interpreter
from worker.engine.programs.onnx_import.read import read_onnx

torch.set_num_threads(1)
node = helper.make_node
_RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> Any:
    return (_RANDOM.standard_normal(shape) * 0.5).astype(np.float32)


def interpret(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    """Return what the importer computes, without the export that makes a program of it."""
    graph = read_onnx(path)
    interpreter = Interpreter(graph, graph.nodes, Constants(graph))
    with torch.no_grad():
        return [value.numpy() for value in interpreter.interpret(list(inputs))]


def check(path: Path, *inputs: torch.Tensor) -> None:
    for mine, theirs in zip(interpret(path, inputs), run_onnx(path, inputs), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


IMAGE: Any = ("n", 3, 9, 10)
STATISTICS = {"s": weights(3), "b": weights(3), "m": weights(3), "v": np.abs(weights(3)) + 0.1}
LAYERS: dict[str, tuple[list[Any], Any, dict[str, Any], str, int]] = {
    "conv": ([node("Conv", ["x", "c1.weight", "c1.bias"], ["y"], pads=[1, 1, 1, 1])], IMAGE,
             {"c1.weight": weights(4, 3, 3, 3), "c1.bias": weights(4)}, "c1 Conv2d", 17),
    "conv_same": ([node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])], IMAGE,
                  {"w": weights(5, 3, 3, 4)}, "conv Conv2d", 17),
    "conv_lower": ([node("Conv", ["x", "w"], ["y"], auto_pad="SAME_LOWER")], IMAGE, {"w": weights(5, 3, 4, 4)},
                   "conv Conv2d", 17),
    "conv_same_free": ([node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])], ("n", 3, "h", "w"),
                       {"w": weights(5, 3, 3, 3)}, "conv Conv2d", 17),
    "conv_uneven": ([node("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 1])], IMAGE, {"w": weights(5, 3, 3, 3)},
                    "conv Conv2d", 11),
    "conv_one": ([node("Conv", ["x", "w", "b"], ["y"])], IMAGE, {"w": weights(1, 3, 3, 3), "b": weights(1)},
                 "conv Conv2d", 17),
    "depthwise": ([node("Conv", ["x", "w"], ["y"], group=3)], ("n", 3, 20), {"w": weights(6, 1, 3)}, "conv Conv1d", 17),
    "transposed": ([node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1, 0, 1, 0],
                         output_padding=[1, 1])], IMAGE, {"w": weights(3, 4, 3, 3), "b": weights(4)},
                   "conv_transpose ConvTranspose2d", 17),
    "transposed_same": ([node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], auto_pad="SAME_UPPER")], IMAGE,
                        {"w": weights(3, 4, 3, 3)}, "conv_transpose ConvTranspose2d", 17),
    "gemm": ([node("Gemm", ["x", "w", "b"], ["y"])], ("n", 6), {"w": weights(6, 4), "b": weights(4)}, "linear Linear",
             17),
    "gemm_turned": ([node("Gemm", ["x", "fc/kernel", "b"], ["y"], transB=1)], ("n", 6),
                    {"fc/kernel": weights(4, 6), "b": weights(1, 4)}, "fc Linear", 17),
    "gemm_scaled": ([node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0)], ("n", 6),
                    {"w": weights(6, 4), "b": weights(4)}, "", 17),
    "matmul_add": ([node("MatMul", ["x", "w"], ["p"], name="net/dense/MatMul"), node("Add", ["b", "p"], ["y"])],
                   ("n", 7, 6), {"w": weights(6, 4), "b": weights(4)}, "net.dense Linear", 17),
    "constants": ([node("Constant", [], ["w"], value=numpy_helper.from_array(weights(4, 6))),
                   node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])], ("n", 6), {}, "linear Linear",
                  17),
    "batch_norm": ([node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], epsilon=1e-3)], IMAGE, STATISTICS,
                   "batch_norm BatchNorm2d", 17),
    "instance_norm": ([node("InstanceNormalization", ["x", "s", "b"], ["y"])], IMAGE, STATISTICS,
                      "instance_norm InstanceNorm2d", 17),
    "layer_norm": ([node("LayerNormalization", ["x", "s", "b"], ["y"], epsilon=1e-3)], ("n", 5, 3), STATISTICS,
                   "layer_norm LayerNorm", 17),
    "group_norm": ([node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)], ("n", 4, 5),
                   {"s": weights(4), "b": weights(4)}, "group_norm GroupNorm", 21),
    "rms_norm": ([node("RMSNormalization", ["x", "s"], ["y"])], ("n", 5, 3), {"s": weights(3)}, "rms_norm RMSNorm", 23),
    "prelu": ([node("PRelu", ["x", "s"], ["y"])], IMAGE, {"s": weights(3, 1, 1)}, "prelu PReLU", 17),
    "rnn": ([node("RNN", ["x", "w", "r"], ["o", ""], hidden_size=4, activations=["Relu"]),
             node("Squeeze", ["o", "one"], ["y"])], (5, "n", 3),
            {"w": weights(1, 4, 3), "r": weights(1, 4, 4), "one": np.array([1])}, "rnn RNN", 17),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_made_and_compute_the_same(name: str, tmp_path: Path) -> None:
    nodes, shape, tensors, expected, opset = LAYERS[name]
    used = {each for item in nodes for each in item.input}
    kept = {key: array for key, array in tensors.items() if key in used}
    program = open_checked(make_onnx_file(tmp_path / "m.onnx", nodes, {"x": shape}, kept, opset=opset))
    assert " ".join(f"{path} {kind}" for path, kind in layers_of(program).items()) == expected


def test_options_of_layers_are_kept(tmp_path: Path) -> None:
    nodes, shape, tensors, _, _ = LAYERS["batch_norm"]
    program = open_checked(make_onnx_file(tmp_path / "m.onnx", nodes, {"x": shape}, tensors))
    layer: Any = program.module.batch_norm
    # ONNX's momentum is the share of the old statistics, torch's that of the new.
    assert (layer.momentum, layer.eps) == (0.1, pytest.approx(1e-3))
    assert {name for name, _ in program.module.named_parameters()} == {"batch_norm.weight", "batch_norm.bias"}


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


TWICE = np.array([1, 1, 2, 2], np.float32)
PICTURE = floats(2, 3, 9, 10)
POOLS: dict[str, dict[str, Any]] = {
    "same": {"auto_pad": "SAME_UPPER"}, "even": {"pads": [1] * 4}, "ceil": {"pads": [1] * 4, "ceil_mode": 1},
}  # fmt: skip
FUNCTIONS: dict[str, tuple[list[Any], torch.Tensor, dict[str, Any], int]] = {
    "max_pool_same": ([node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")],
                      PICTURE, {}, 17),
    "max_pool_ceil": ([node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=1)],
                      PICTURE, {}, 17),
    **{f"average_pool_{kind}_{whole}": (
        [node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], count_include_pad=whole, **options)],
        PICTURE, {}, 17)
       for whole in (0, 1)
       for kind, options in POOLS.items()},
    "global_average": ([node("GlobalAveragePool", ["x"], ["g"]), node("Flatten", ["g"], ["y"])], PICTURE, {}, 17),
    "global_max": ([node("GlobalMaxPool", ["x"], ["y"])], PICTURE, {}, 17),
    "resize_nearest": ([node("Resize", ["x", "", "s"], ["y"], mode="nearest", nearest_mode="floor",
                             coordinate_transformation_mode="asymmetric")], PICTURE, {"s": TWICE}, 17),
    "resize_half": ([node("Resize", ["x", "", "s"], ["y"], mode="nearest")], PICTURE, {"s": TWICE}, 17),
    "resize_linear": ([node("Resize", ["x", "", "s"], ["y"], mode="linear")], PICTURE, {"s": TWICE}, 17),
    "resize_corners": ([node("Resize", ["x", "", "", "z"], ["y"], mode="linear",
                             coordinate_transformation_mode="align_corners")], PICTURE,
                       {"z": np.array([2, 3, 17, 13])}, 17),
    "resize_cubic": ([node("Resize", ["x", "", "s"], ["y"], mode="cubic")], PICTURE, {"s": TWICE}, 17),
    "upsample": ([node("Upsample", ["x", "s"], ["y"])], PICTURE, {"s": TWICE}, 9),
    "clip": ([node("Clip", ["x", "low", ""], ["y"])], PICTURE, {"low": np.float32(0.5)}, 17),
    "clip_six": ([node("Clip", ["x"], ["y"], min=0.0, max=6.0)], PICTURE, {}, 10),
    "dropout": ([node("Dropout", ["x", "r"], ["y"])], PICTURE, {"r": np.float32(0.5)}, 17),
    "softmax_flat": ([node("Softmax", ["x"], ["y"], axis=1)], PICTURE, {}, 11),
    "softmax": ([node("LogSoftmax", ["x"], ["y"], axis=1)], PICTURE, {}, 17),
    "local_norm": ([node("LRN", ["x"], ["y"], size=3)], PICTURE, {}, 17),
    "pad_reflect": ([node("Pad", ["x", "p"], ["y"], mode="reflect")], PICTURE,
                    {"p": np.array([0, 0, 1, 2, 0, 0, 3, 4])}, 17),
    "pad_axes": ([node("Pad", ["x", "p", "c", "a"], ["y"])], PICTURE,
                 {"p": np.array([1, 2]), "c": np.float32(3), "a": np.array([-2])}, 18),
    "einsum": ([node("Einsum", ["x", "x"], ["y"], equation="nchw,ncij->nhi")], PICTURE, {}, 17),
    "depth_to_space": ([node("DepthToSpace", ["x"], ["y"], blocksize=2)], floats(2, 8, 4, 5), {}, 17),
    "depth_to_space_crd": ([node("DepthToSpace", ["x"], ["y"], blocksize=2, mode="CRD")], floats(2, 8, 4, 5), {}, 17),
    "space_to_depth": ([node("SpaceToDepth", ["x"], ["y"], blocksize=2)], floats(2, 3, 4, 6), {}, 17),
    "top_k": ([node("TopK", ["x", "k"], ["y", "i"], axis=1)], floats(3, 9), {"k": np.array([3])}, 17),
    "cumulated": ([node("CumSum", ["x", "a"], ["y"], exclusive=1, reverse=1)], floats(3, 9), {"a": np.array(1)}, 17),
    "scattered": ([node("ScatterND", ["x", "i", "u"], ["y"])], floats(4, 3),
                  {"i": np.array([[1], [-1]]), "u": weights(2, 3)}, 17),
    "scattered_elements": ([node("ScatterElements", ["x", "i", "u"], ["y"], axis=1)], floats(1, 3),
                           {"i": np.array([[1, -1]]), "u": weights(1, 2)}, 17),
    "gathered": ([node("GatherND", ["x", "i"], ["y"])], floats(4, 3), {"i": np.array([[1, 2], [-1, 0]])}, 17),
    "gathered_elements": ([node("GatherElements", ["x", "i"], ["y"], axis=0)], floats(4, 3),
                          {"i": np.array([[1, -2, 0]])}, 17),
    "picked": ([node("Gather", ["x", "i"], ["y"], axis=1)], floats(4, 3), {"i": np.array([[2, -1], [0, 1]])}, 17),
    "backwards": ([node("Slice", ["x", "s", "e", "a", "t"], ["y"])], floats(2, 9),
                  {"s": np.array([7]), "e": np.array([-(2**63)]), "a": np.array([1]), "t": np.array([-2])}, 17),
    "split": ([node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), node("Concat", ["b", "a"], ["y"], axis=1)],
              floats(2, 7), {}, 18),
    "chosen": ([node("ArgMax", ["x"], ["i"], axis=1), node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)], floats(4, 9),
               {}, 17),
    "one_hot": ([node("ArgMax", ["x"], ["i"], axis=1, keepdims=0), node("OneHot", ["i", "d", "v"], ["y"], axis=0)],
                floats(4, 9), {"d": np.array(9), "v": np.array([0.5, 2], np.float32)}, 17),
    "triangle": ([node("Trilu", ["x", "k"], ["y"], upper=0)], floats(2, 4, 4), {"k": np.array(1)}, 17),
    "masked": ([node("Greater", ["x", "z"], ["c"]), node("Where", ["c", "x", "f"], ["y"])], floats(3, 5),
               {"z": np.float32(0), "f": np.float32(-np.inf)}, 17),
    "power": ([node("Pow", ["x", "k"], ["y"])], floats(3, 5), {"k": np.array(3)}, 17),
    "means": ([node("Sum", ["x", "x", "b"], ["s"]), node("Mean", ["s", "x"], ["m"]), node("Max", ["m", "x"], ["y"])],
              floats(3, 4), {"b": weights(4)}, 17),
    "flat": ([node("Shape", ["x"], ["h"]), node("Gather", ["h", "i"], ["n"]), node("Unsqueeze", ["n", "z"], ["u"]),
              node("Concat", ["u", "m"], ["r"], axis=0), node("Reshape", ["x", "r"], ["y"])], PICTURE,
             {"i": np.array(0), "z": np.array([0]), "m": np.array([-1])}, 17),
    "expanded": ([node("Shape", ["x"], ["h"]), node("Expand", ["b", "h"], ["y"])], floats(3, 5), {"b": weights(1, 5)},
                 17),
    "hard": ([node("HardSigmoid", ["x"], ["a"], alpha=0.3), node("HardSwish", ["a"], ["b"]),
              node("Selu", ["b"], ["c"]), node("ThresholdedRelu", ["c"], ["d"], alpha=0.1),
              node("Shrink", ["d"], ["y"], lambd=0.2, bias=0.1)], PICTURE, {}, 17),
    "gelu": ([node("Gelu", ["x"], ["a"], approximate="tanh"), node("Gelu", ["a"], ["y"])], PICTURE, {}, 20),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "attributes", "mask"),
    [
        ((2, 4, 5, 8), {"is_causal": 1}, None),
        ((2, 4, 5, 8), {"scale": 0.5}, weights(5, 5)),
        ((2, 5, 32), {"q_num_heads": 4, "kv_num_heads": 4}, np.tri(5, dtype=bool)),
    ],
)
def test_attention_computes_the_same(
    shape: tuple[int, ...], attributes: dict[str, Any], mask: Any, tmp_path: Path
) -> None:
    tensors = {} if mask is None else {"mask": mask}
    nodes = [node("Attention", ["q", "k", "v", *tensors], ["y"], **attributes)]
    path = make_onnx_file(tmp_path / "m.onnx", nodes, dict.fromkeys("qkv", shape), tensors, opset=23)
    check(path, *(torch.randn(shape) for _ in range(3)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compute_the_same(name: str, tmp_path: Path) -> None:
    nodes, given_input, tensors, opset = FUNCTIONS[name]
    path = make_onnx_file(tmp_path / "m.onnx", nodes, {"x": tuple(given_input.shape)}, tensors, opset=opset)
    check(path, given_input)


UNARY = (
    *("Abs", "Neg", "Exp", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Atan", "Sinh", "Asinh", "Tanh", "Sigmoid"),
    *("Relu", "Erf", "Softplus", "Softsign", "LeakyRelu", "Elu", "Celu", "Mish", "HardSwish", "Identity"),
)
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")
REDUCED = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_chains_of_operators_compute_the_same(tmp_path: Path, data: st.DataObject) -> None:
    """Random chains over random shapes: broadcasting, reductions with and without kept axes, permutations."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), "shape")
    tensors: dict[str, Any] = {}
    nodes: list[Any] = []
    rank, last = len(shape), "x"
    for index in range(data.draw(st.integers(1, 4), "length")):
        result, kind = f"v{index}", data.draw(st.sampled_from(["unary", "binary", "reduce", "permute", "axes"]), "kind")
        if kind == "unary" or rank == 0:
            nodes.append(node(data.draw(st.sampled_from(UNARY), "operator"), [last], [result]))
        elif kind == "binary":
            # One that broadcasts to whatever the shape is by now.
            tensors[f"c{index}"] = weights(*[1] * data.draw(st.integers(0, rank), "axes"))
            operator = data.draw(st.sampled_from(BINARY), "operator")
            turned = operator not in ("PRelu", "Div") and data.draw(st.booleans(), "turned")
            operands = [last, f"c{index}"]
            nodes.append(node(operator, operands[::-1] if turned else operands, [result]))
        elif kind == "reduce":
            axes = data.draw(st.lists(st.integers(0, rank - 1), unique=True, min_size=1), "axes")
            keep = data.draw(st.booleans(), "keep")
            tensors[f"a{index}"] = np.array([axis - data.draw(st.sampled_from([0, rank])) for axis in axes])
            name = f"Reduce{data.draw(st.sampled_from(REDUCED), 'operator')}"
            nodes.append(node(name, [last, f"a{index}"], [result], keepdims=int(keep)))
            rank -= 0 if keep else len(axes)
        elif kind == "permute":
            nodes.append(node("Transpose", [last], [result], perm=data.draw(st.permutations(range(rank)), "order")))
        else:
            tensors[f"a{index}"] = np.array([data.draw(st.integers(-rank - 1, rank), "axis")])
            nodes.append(node("Unsqueeze", [last, f"a{index}"], [result]))
            rank += 1
        last = result
    path = make_onnx_file(tmp_path / "m.onnx", [*nodes, node("Identity", [last], ["y"])], {"x": shape}, tensors)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    check(path, torch.randn(shape, generator=generator).clamp(-2, 2))


def test_integers_are_divided_as_onnx_does(tmp_path: Path) -> None:
    nodes = [node("Div", ["x", "k"], ["a"]), node("Mod", ["x", "k"], ["b"]), node("Add", ["a", "b"], ["y"])]
    path = make_onnx_file(tmp_path / "m.onnx", nodes, {"x": (5,)}, {"k": np.array([3])}, kind=TensorProto.INT64)
    check(path, torch.tensor([-7, -1, 0, 4, 9]))


def test_a_wrong_import_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with ONNX Runtime at intake catches what no other check can."""
    from worker.engine.programs.onnx_import import table

    path = make_onnx_file(tmp_path / "m.onnx", [node("Softplus", ["x"], ["y"])], {"x": ("n", 4)})

    def wrong(call: Call) -> Any:
        return torch.relu(call.tensor(0))

    monkeypatch.setitem(table.TABLE, "Softplus", wrong)
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "onnx")
    assert caught.value.code == "import_differs"


def test_a_large_output_is_compared_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engine.programs.onnx_import import compare, table

    path = make_onnx_file(tmp_path / "m.onnx", [node("Softplus", ["x"], ["y"])], {"x": (5, 3)})

    def wrong_in_the_last(call: Call) -> Any:
        right = torch.nn.functional.softplus(call.tensor(0))
        return torch.cat([right[:4], right[4:] + 1])

    monkeypatch.setattr(compare, "_AT_ONCE", 4)
    open_program(path, tmp_path, "onnx")
    monkeypatch.setitem(table.TABLE, "Softplus", wrong_in_the_last)
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "onnx")
    assert caught.value.code == "import_differs"


def test_an_import_that_is_right_at_one_length_only_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engine.programs.onnx_import import table

    path = make_onnx_file(tmp_path / "m.onnx", [node("Softplus", ["x"], ["y"])], {"x": ("n", "length")})
    length = open_program(path, tmp_path, "onnx").signature.example_sizes["x_1"]

    def wrong(call: Call) -> Any:
        tensor = call.tensor(0)
        return torch.nn.functional.softplus(tensor) + (tensor.shape[1] - length)

    monkeypatch.setitem(table.TABLE, "Softplus", wrong)
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "onnx")
    assert caught.value.code == "import_differs"


@pytest.mark.parametrize(
    ("nodes", "code", "words"),
    [
        ([node("NonZero", ["x"], ["y"])], "unsupported_operator", "NonZero"),
        ([node("Reshape", ["x", "c"], ["y"])], "data_dependent_size", "Reshape"),
        ([node("Resize", ["x", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="asymmetric")],
         "unsupported_operator", "asymmetric"),
        ([node("Dropout", ["x", "r", "t"], ["y"])], "unsupported_operator", "training"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_named(nodes: list[Any], code: str, words: str, tmp_path: Path) -> None:
    before = [node("ReduceSum", ["x"], ["f"], keepdims=1), node("Cast", ["f"], ["c"], to=TensorProto.INT64)]
    tensors: dict[str, Any] = {"s": TWICE, "r": np.float32(0.5), "t": np.array(True)}
    path = make_onnx_file(tmp_path / "m.onnx", [*before, *nodes], {"x": ("n", 3, 4, 4)}, tensors)
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "onnx")
    assert caught.value.code == code
    assert words in caught.value.detail
    assert caught.value.fix
