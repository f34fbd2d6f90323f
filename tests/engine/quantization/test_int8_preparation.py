"""What happens before rounding keeps the function; what rounds stays within its bounds."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from app.recipes.facts import TensorFacts
from worker.engine.measure.padding import clear_padding, find_mask
from worker.engine.programs.program import Signature
from worker.engine.quantization import fidelity
from worker.engine.quantization.embedding_tables import quantize_tables
from worker.engine.quantization.int8_gptq import round_by_gptq
from worker.engine.quantization.int8_grid import largest_code, round_to_int8
from worker.engine.quantization.preparation import (
    correct_biases,
    equalize,
    fold_batch_norms,
    measure_largest_inputs,
    smooth,
)
from worker.engine.quantization.ranges import search_range

torch.set_num_threads(1)
SEEDS = st.integers(0, 2**20)


@given(SEEDS, st.floats(0, 1), st.booleans())
@settings(max_examples=20, deadline=None)
def test_smoothing_keeps_the_function_and_evens_features(seed: int, alpha: float, fold: bool) -> None:
    torch.manual_seed(seed)
    layers = [nn.LayerNorm(12), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 5)]
    with torch.no_grad():
        layers[0].weight[4] = 50.0  # type: ignore[operator]
    module = fx.symbolic_trace(nn.Sequential(*(layers if fold else layers[1:])))
    x = torch.randn(20, 12)
    expected = module(x)
    largest = measure_largest_inputs(module, [(x,)])
    folded, multiplied = smooth(module, largest, alpha)
    assert (folded, multiplied) == ((1, 1) if fold else (0, 2))
    torch.testing.assert_close(module(x), expected, rtol=1e-3, atol=1e-4)
    if fold and alpha > 0.5:
        after = measure_largest_inputs(module, [(x,)])["1"]
        before = largest["1"]
        assert after.max() / after.median() < before.max() / before.median()


@given(SEEDS, st.booleans())
@settings(max_examples=15, deadline=None)
def test_folding_and_equalization_keep_the_function(seed: int, depthwise: bool) -> None:
    torch.manual_seed(seed)
    second = nn.Conv2d(6, 6, 3, groups=6) if depthwise else nn.Conv2d(6, 4, 3)
    sequence = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), second).eval()
    norm = sequence[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 10)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 3)
    module = fx.symbolic_trace(sequence)
    x = torch.randn(3, 2, 9, 9)
    expected = module(x)
    assert fold_batch_norms(module) == 1
    assert not any(isinstance(each, nn.BatchNorm2d) for each in module.modules())
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert equalize(module) == 1
    torch.testing.assert_close(module(x), expected, rtol=1e-3, atol=1e-4)
    one, other = (module.get_submodule(name).weight for name in ("0", "3"))
    right = other.abs().amax((1, 2, 3)) if depthwise else other.abs().amax((0, 2, 3))  # type: ignore[operator]
    torch.testing.assert_close(one.abs().amax((1, 2, 3)), right, rtol=0.01, atol=1e-6)  # type: ignore[operator]


def test_equalization_stops_at_other_readers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            return y + self.two(y)

    assert equalize(fx.symbolic_trace(Branches())) == 0


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_corrected_biases_leave_no_mean_error(seed: int) -> None:
    torch.manual_seed(seed)
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 5, bias=seed % 2 == 0)))
    x = torch.rand(50, 6)
    expected = module(x).mean(0)
    layer = module.get_submodule("0")
    rounded = {"0": layer.weight.detach().mul(4).round().div(4)}  # type: ignore[operator]
    assert correct_biases(module, rounded, [(x,)]) == 1
    layer.weight = nn.Parameter(rounded["0"])
    torch.testing.assert_close(module(x).mean(0), expected, rtol=1e-4, atol=1e-5)


@given(
    arrays.arrays(np.float32, (5, 7), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([0, 1, None]),
    st.sampled_from([7, 8]),
)
@settings(max_examples=60, deadline=None)
def test_rounding_errs_by_at_most_half_a_step(weight: np.ndarray, axis: int | None, bits: int) -> None:
    codes, scales = round_to_int8(weight, axis, bits)
    assert np.abs(codes.astype(int)).max() <= largest_code(bits)
    assert np.all(np.abs(codes * scales - weight) <= scales * 0.5001 + 1e-30)
    again, same = round_to_int8(
        codes * scales, axis, bits, np.broadcast_to(scales, (5, 7))[:, 0] if axis == 0 else None
    )
    if axis == 0:
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_array_equal(same, scales)


@given(arrays.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=15, deadline=None)
def test_looked_up_rows_are_within_half_a_step(table: np.ndarray) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"], name="lookup")],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [6])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [6, 3])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert quantize_tables(model, ["lookup"]) == {"table"}
    assert "table" not in {each.name for each in model.graph.initializer}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"ids": np.arange(6)})
    assert np.all(np.abs(rows - table) <= np.abs(table).max(1, keepdims=True) / 254 * 1.001 + 1e-30)


def test_a_table_that_is_also_a_weight_stays_whole() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="lookup"),
        helper.make_node("MatMul", ["rows", "table"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes, "tied", [helper.make_tensor_value_info("ids", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "table")],
    )  # fmt: skip
    assert quantize_tables(onnx.helper.make_model(graph), ["lookup"]) == set()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(bits: int, *, per_channel: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 160), torch.randn(500, 40) @ torch.randn(40, 160)
    mask = torch.rand(weight.shape) > 0.3
    weight = weight * mask
    codes, scales = round_by_gptq(weight, x.T @ x, bits, per_channel=per_channel, mask=mask)
    plain, plain_scales = round_to_int8(weight.numpy(), 0 if per_channel else None, bits)
    error, before = (
        float(((weight - each) @ x.T).square().sum())
        for each in (codes * scales, torch.from_numpy(plain * plain_scales))
    )
    assert error < 0.5 * before
    assert codes.abs().max() <= largest_code(bits)
    assert not codes[~mask].any()


def test_ranges_cut_off_an_outlier_that_costs_more_than_it_is_worth() -> None:
    counts = np.zeros(1000)
    counts[490:510] = 1e6
    counts[999] = 1
    low, high = search_range(counts, -1.0, 1.0)
    assert -0.5 < low < 0 < high < 0.5
    assert search_range(np.ones(1000), -1.0, 1.0) == (-1.0, 1.0)


def test_padded_positions_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    found = find_mask(["ids", "attention_mask"], [np.ones((2, 3), np.int64), mask])
    assert found is not None
    assert found.tolist() == (mask == 1).tolist()
    assert find_mask(["ids"], [mask]) is None
    assert find_mask(["attention_mask"], [mask * 2]) is None
    output = np.ones((2, 3, 4), np.float32)
    assert clear_padding(output, found)[0, 2].tolist() == [0, 0, 0, 0]
    assert clear_padding(output, found).sum() == 20
    assert clear_padding(np.ones((2, 4)), found).sum() == 8
    noise = {"before.onnx": 1.0, "after.onnx": -1.0}

    def open_model(path: Path, *_: object) -> object:
        result = output.copy()
        result[0, 2] = 100 * noise[path.name]
        return lambda _: (result,)

    monkeypatch.setattr(fidelity, "open_model", open_model)
    facts = TensorFacts(name="attention_mask", dtype="int64", shape=("batch", 3))
    signature = Signature((facts,), (TensorFacts(name="y", dtype="float32", shape=("batch", 3, 4)),), None)
    files = Path("before.onnx"), Path("after.onnx")
    same = fidelity.compare_files(signature, *files, [(torch.from_numpy(mask),)], 1)
    assert same.cosine == pytest.approx(1.0)
    assert same.error == 0.0
    # Without padding, the same difference counts.
    other = fidelity.compare_files(signature, *files, [(torch.ones(2, 3, dtype=torch.int64),)], 1)
    assert other.cosine < 0.1
    assert other.error > 1
