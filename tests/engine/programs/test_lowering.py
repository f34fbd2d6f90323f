"""Encoded weights in ONNX files: stored by their codes, decoded exactly, and multiplied as integers where that runs."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from app.recipes.facts import TensorFacts
from worker.engine.packing.encodings import Codebook, Encoding, Grouped
from worker.engine.programs.lowering.bits import pack_bits
from worker.engine.programs.lowering.integers import find_integer_layers
from worker.engine.programs.lowering.lower import can_lower, lower
from worker.engine.programs.program import Program, Signature
from worker.engine.quantization.rounding import round_to_fixed, round_to_float, round_to_groups

EXACT = 2e-6
ROUNDED_ACTIVATIONS = 2e-2


class One(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def make(layer: nn.Module, encoding: Encoding) -> Program:
    facts = TensorFacts(name="x", dtype="float32", shape=("batch",))
    program = Program(fx.symbolic_trace(One(layer)).eval(), Signature((facts,), (facts,), None), "eval")
    program.encode("layer.weight", encoding)
    return program


def export(program: Program, nodes: list[onnx.NodeProto], rank: int, *, integer_input: bool = False) -> onnx.ModelProto:
    """Return the nodes, from x to y, as a model with the program's parameters under their names."""
    kind = TensorProto.INT64 if integer_input else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", kind, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (rank + integer_input))],
        [numpy_helper.from_array(each.detach().numpy(), name) for name, each in program.module.named_parameters()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    lower(model, program)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def assert_close(found: Tensor, program: Program, x: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        (expected,) = program.module(x)
    assert found.shape == expected.shape
    error = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    assert error <= tolerance


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def stored(model: onnx.ModelProto) -> int:
    return sum(len(each.raw_data) for each in model.graph.initializer)


@given(
    bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([16, 32, 64, 128, 256, 512]),
    symmetric=st.booleans(), features=st.integers(1, 300), rows=st.integers(1, 40),
    form=st.sampled_from(["gemm", "matmul"]), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_linear_layers_are_computed_from_codes(
    bits: int, group_size: int, symmetric: bool, features: int, rows: int, form: str, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(features, rows, bias=form == "gemm")
    program = make(layer, round_to_groups(layer.weight, bits, group_size, symmetric=symmetric))
    if form == "gemm":
        nodes = [helper.make_node("Gemm", ["x", "layer.weight", "layer.bias"], ["y"], transB=1)]
        x = torch.randn(3, features)
    else:
        nodes = [
            helper.make_node("Transpose", ["layer.weight"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
        x = torch.randn(2, 3, features)
    model = export(program, nodes, x.ndim)
    assert operators(model) == (["MatMulNBits", "Add"] if form == "gemm" else ["MatMulNBits"])
    assert find_integer_layers(program) == ["layer"]
    with torch.no_grad():
        (expected,) = program.module(x)
    # Activations are rounded to 8 bits, block by block.
    bound = x.abs().amax(-1, keepdim=True) / 254 * layer.weight.abs().sum(1)
    assert bool(((run(model, x) - expected).abs() <= 1.01 * bound.detach() + 1e-5).all())


def test_four_bits_take_an_eighth_and_two_a_sixteenth() -> None:
    for bits, share in ((4, 8), (2, 16)):
        layer = nn.Linear(1024, 64, bias=False)
        program = make(layer, round_to_groups(layer.weight, bits, 64, symmetric=True))
        model = export(program, [helper.make_node("Gemm", ["x", "layer.weight"], ["y"], transB=1)], 2)
        assert stored(model) == 4 * 1024 * 64 // share + 4 * 64 * 16


def test_a_table_is_looked_up_as_codes_and_shared_with_the_output_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(30, 40)
    program = make(layer, round_to_groups(layer.weight, 4, 16, symmetric=False))
    nodes = [
        helper.make_node("Gather", ["layer.weight", "x"], ["rows"]),
        helper.make_node("Transpose", ["layer.weight"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "t"], ["y"]),
    ]
    model = export(program, nodes, 2, integer_input=True)
    assert "layer.weight" not in {each.name for each in model.graph.initializer}
    assert sum("codes" in each.name for each in model.graph.initializer) == 1
    x = torch.randint(0, 30, (2, 5))
    with torch.no_grad():
        expected = program.module(x)[0] @ layer.weight.T
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=ROUNDED_ACTIVATIONS * float(expected.abs().max()))


ENCODINGS: dict[str, Any] = {
    **{
        f"int{bits} {group} {'symmetric' if symmetric else ''}": (
            lambda weight, bits=bits, group=group, symmetric=symmetric: round_to_groups(
                weight, bits, group, symmetric=symmetric
            )
        )
        for bits, group, symmetric in [(2, 16, True), (2, 32, False), (3, 16, False), (4, 16, True), (4, 64, False),
                                       (5, 16, False), (8, 256, True), (4, 7, False)]
    },
    **{name: (lambda weight, name=name: round_to_float(weight, name)) for name in
       ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2")},
    **{f"fixed{bits}": (lambda weight, bits=bits: round_to_fixed(weight, bits, None)) for bits in (2, 3, 4, 6, 8, 16)},
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_lookups_decode_exactly(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(11, 27)
    program = make(layer, ENCODINGS[name](layer.weight))
    model = export(program, [helper.make_node("Gather", ["layer.weight", "x"], ["y"])], 2, integer_input=True)
    x = torch.randint(0, 11, (3, 4))
    assert_close(run(model, x), program, x, 0.0)
    first = next(node for node in model.graph.node)
    assert first.op_type == "Gather", "rows are looked up before they are decoded"


@pytest.mark.parametrize("name", ENCODINGS)
def test_convolutions_decode_exactly_and_are_stored_by_codes(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 40, 3, bias=False)
    program = make(layer, ENCODINGS[name](layer.weight))
    model = export(program, [helper.make_node("Conv", ["x", "layer.weight"], ["y"])], 4)
    x = torch.randn(2, 3, 6, 6)
    assert_close(run(model, x), program, x, EXACT)
    shares = {"fixed2": 0.13, "fixed8": 0.27, "fixed16": 0.52, "fp16": 0.51, "int4 64 ": 0.2}
    assert stored(model) < shares.get(name, 0.6) * 4 * layer.weight.numel()
    assert find_integer_layers(program) == []


def test_a_weight_that_is_also_used_in_another_way_keeps_its_name() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 6, bias=False)
    program = make(layer, round_to_groups(layer.weight, 4, 16, symmetric=False))
    nodes = [
        helper.make_node("Gemm", ["x", "layer.weight"], ["product"], transB=1),
        helper.make_node("ReduceSum", ["layer.weight"], ["sum"], keepdims=0),
        helper.make_node("Add", ["product", "sum"], ["y"]),
    ]
    model = export(program, nodes, 2)
    assert "MatMulNBits" in operators(model)
    x = torch.randn(2, 32)
    with torch.no_grad():
        expected = layer(x) + layer.weight.sum()
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=ROUNDED_ACTIVATIONS * float(expected.abs().max()))


def test_a_gemm_of_another_kind_stays_one() -> None:
    layer = nn.Linear(32, 32, bias=False)
    program = make(layer, round_to_groups(layer.weight, 4, 16, symmetric=False))
    model = export(program, [helper.make_node("Gemm", ["x", "layer.weight"], ["y"])], 2)
    assert operators(model)[-1] == "Gemm"
    x = torch.randn(2, 32)
    torch.testing.assert_close(run(model, x), x @ layer.weight.detach(), rtol=1e-5, atol=1e-6)


def test_codebooks_are_left_to_packed_files() -> None:
    layer = nn.Linear(4, 4, bias=False)
    codebook = Codebook(torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, 2), 4)
    program = make(layer, codebook)
    assert not can_lower(program)
    assert find_integer_layers(program) == []
    assert can_lower(make(layer, round_to_groups(layer.weight, 4, 16, symmetric=True)))


@given(bits=st.sampled_from([1, 2, 4, 8]), count=st.integers(1, 20), seed=st.integers(0, 9))
def test_codes_are_packed_lowest_bits_first(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, count), dtype=np.uint8)
    packed = pack_bits(codes, bits)
    per_byte = 8 // bits
    assert packed.shape == (3, -(-count // per_byte))
    for column in range(count):
        found = packed[:, column // per_byte] >> (column % per_byte * bits) & (2**bits - 1)
        assert np.array_equal(found, codes[:, column])


def test_a_grouped_weight_without_an_integer_operator_is_no_integer_layer() -> None:
    layer = nn.Linear(40, 4)
    for bits, group_size in ((5, 16), (4, 20)):
        encoding = round_to_groups(layer.weight, bits, group_size, symmetric=False)
        assert isinstance(encoding, Grouped)
        assert find_integer_layers(make(layer, encoding)) == []
