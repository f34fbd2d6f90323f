"""GPTQ and AWQ: never a larger output error than rounding to nearest; zeros stay zero, functions stay equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from app.recipes.facts import TensorFacts
from worker.engine.measure.activations import Gram, iterate_rows
from worker.engine.packing.encodings import Grouped
from worker.engine.programs.program import Program, Signature
from worker.engine.quantization.awq import divide_source, find_source, round_by_clipping, round_by_scaling
from worker.engine.quantization.gptq import output_error, round_by_gptq
from worker.engine.quantization.rounding import round_to_float, round_to_groups


def observe(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Gram:
    gram = Gram(layer)
    for rows in iterate_rows(layer, inputs):
        gram.add(rows)
    return gram


def measure(layer: nn.Linear | nn.Conv2d, inputs: Tensor, values: Tensor) -> float:
    """Return the squared output error of other weights, by running the layer."""
    with torch.no_grad():
        before = layer(inputs)
        kept = layer.weight.data
        layer.weight.data = values
        after = layer(inputs)
        layer.weight.data = kept
    return float((after - before).double().square().sum())


def correlated(rows: int, features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    outliers = torch.exp(torch.randn(features, generator=generator))
    return torch.randn(rows, features, generator=generator) @ mixing * outliers


@given(
    bits=st.integers(2, 4), symmetric=st.booleans(), group_size=st.sampled_from([16, 32, 256]),
    features=st.integers(1, 70), rows=st.integers(1, 60), seed=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_gptq_is_never_worse_than_rtn_on_the_calibration_rows(
    bits: int, symmetric: bool, group_size: int, features: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, inputs = nn.Linear(features, 5), correlated(rows, features, seed)
    gram = observe(layer, inputs)
    found, errors = round_by_gptq(layer.weight, gram.matrix, bits, group_size, symmetric=symmetric, damping=0.01)
    plain = round_to_groups(layer.weight, bits, group_size, symmetric=symmetric)
    one, other = (measure(layer, inputs, each.decode()) for each in (found, plain))
    assert one <= other * (1 + 1e-3) + 1e-6
    assert errors["chosen"] <= errors["rtn"]
    assert int(found.codes.max()) < 2**bits
    assert found.scales.shape == plain.scales.shape


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_halves_the_error_where_inputs_are_correlated(bits: int) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(384, 24), correlated(1200, 384, 0)
    found, errors = round_by_gptq(layer.weight, observe(layer, inputs).matrix, bits, 64, symmetric=False, damping=0.01)
    # More than one block of columns: errors must reach the later ones.
    assert errors["chosen"] < 0.55 * errors["rtn"]
    assert measure(layer, inputs, found.decode()) == pytest.approx(errors["chosen"], rel=1e-2)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gptq_rounds_convolutions_group_by_group(groups: int) -> None:
    torch.manual_seed(groups)
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    inputs = torch.randn(12, 8, 9, 9).cumsum(-1)
    found, errors = round_by_gptq(layer.weight, observe(layer, inputs).matrix, 3, 32, symmetric=True, damping=0.01)
    assert found.shape == layer.weight.shape
    assert measure(layer, inputs, found.decode()) == pytest.approx(errors["chosen"], rel=1e-2)
    plain = measure(layer, inputs, round_to_groups(layer.weight, 3, 32, symmetric=True).decode())
    assert errors["chosen"] < 0.7 * plain


def test_gptq_keeps_pruned_weights_zero_and_makes_good_for_them() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 8), correlated(200, 64, 0)
    mask = torch.rand(8, 64) > 0.5
    with torch.no_grad():
        layer.weight.mul_(mask)
    gram = observe(layer, inputs).matrix
    found, errors = round_by_gptq(layer.weight, gram, 3, 32, symmetric=False, damping=0.01, mask=mask)
    assert bool((found.decode()[~mask] == 0).all())
    assert errors["chosen"] < 0.8 * errors["rtn"]


def test_gptq_survives_inputs_that_are_always_zero_or_equal() -> None:
    layer, inputs = nn.Linear(20, 3), torch.randn(50, 20)
    inputs[:, 4] = 0
    inputs[:, 5] = inputs[:, 6]
    gram = observe(layer, inputs).matrix
    found, errors = round_by_gptq(layer.weight, gram, 4, 16, symmetric=False, damping=1e-6)
    assert bool(found.decode().isfinite().all())
    assert errors["chosen"] <= errors["rtn"]
    nothing, _ = round_by_gptq(layer.weight, torch.zeros_like(gram), 4, 16, symmetric=False, damping=0.01)
    assert torch.equal(nothing.codes, round_to_groups(layer.weight, 4, 16, symmetric=False).codes)


def test_the_error_of_a_gram_is_the_error_of_the_outputs() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 7, 7)
    change = torch.randn_like(layer.weight)
    gram = observe(layer, inputs)
    found = output_error(change.reshape(6, -1), gram.matrix)
    assert found == pytest.approx(measure(layer, inputs, layer.weight.detach() + change), rel=1e-4)


@given(bits=st.integers(2, 4), symmetric=st.booleans(), seed=st.integers(0, 30))
@settings(max_examples=8, deadline=None)
def test_awq_is_never_worse_than_rtn_on_the_calibration_rows(bits: int, symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layers, inputs = [nn.Linear(40, 6), nn.Linear(40, 9)], correlated(80, 40, seed)
    gram = observe(layers[0], inputs)
    done, scales = round_by_scaling([each.weight for each in layers], gram, bits, 32, symmetric=symmetric)
    total = plain = 0.0
    for layer, rounded in zip(layers, done, strict=True):
        total += measure(layer, inputs, rounded.encoding.decode() / scales)
        plain += rounded.rtn_error
        assert rounded.error == pytest.approx(measure(layer, inputs, rounded.encoding.decode() / scales), rel=1e-2)
        alone = round_by_clipping(layer.weight, gram, bits, 32, symmetric=symmetric)
        assert alone.error <= alone.rtn_error
        assert alone.error == pytest.approx(measure(layer, inputs, alone.encoding.decode()), rel=1e-2, abs=1e-9)
    assert total <= plain * (1 + 1e-3)


def test_awq_gains_where_few_channels_are_large() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(128, 32), torch.randn(300, 128)
    inputs[:, ::17] *= 30
    done, scales = round_by_scaling([layer.weight], observe(layer, inputs), 3, 64, symmetric=False)
    assert done[0].error < 0.5 * done[0].rtn_error
    assert float(scales[::17].min()) > float(scales[1::17].max())


class Chain(nn.Module):
    """A norm read by two layers, a linear layer read through ReLU, a layer behind GELU, and a shared value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.relu, self.gelu = nn.Dropout(0.5), nn.ReLU(), nn.GELU()
        self.after_relu, self.after_gelu, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.free = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        a = self.after_relu(self.relu(self.drop(self.one(y))))
        b = self.after_gelu(self.gelu(self.two(y)))
        z = self.free(a + b)
        return self.last(z), z


def make_chain() -> Program:
    torch.manual_seed(0)
    x = TensorFacts(name="x", dtype="float32", shape=("batch", 8))
    outputs = tuple(TensorFacts(name=name, dtype="float32", shape=("batch", 3)) for name in "ab")
    return Program(fx.symbolic_trace(Chain()).eval(), Signature((x,), outputs, None), "eval")


@pytest.mark.parametrize(
    ("layers", "source"),
    [
        (["one", "two"], "norm"),
        (["one"], None),  # two reads the same value
        (["after_relu"], "one"),
        (["after_gelu"], None),  # GELU does not commute with a scale
        (["last"], None),  # its input is an output of the program
    ],
)
def test_a_scale_goes_only_where_nothing_else_changes(layers: list[str], source: str | None) -> None:
    found = find_source(make_chain(), layers, set(layers))
    assert (found.name if found else None) == source


@pytest.mark.parametrize(
    ("layers", "coded"), [(["one", "two"], False), (["after_relu"], False), (["after_relu"], True)]
)
def test_dividing_a_source_undoes_scaled_weights_exactly(layers: list[str], coded: bool) -> None:
    program = make_chain()
    if coded:
        weight = program.module.get_parameter("one.weight")
        program.encode("one.weight", round_to_groups(weight, 4, 16, symmetric=False))
    x = torch.randn(5, 8)
    before = program.module(x)
    scales = torch.rand(8) + 0.5
    source = find_source(program, layers, set(layers))
    assert source is not None
    divide_source(program, source, scales)
    with torch.no_grad():
        for name in layers:
            program.module.get_parameter(f"{name}.weight").mul_(scales)
    for one, other in zip(program.module(x), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if coded:
        encoding = program.encodings["one.weight"]
        assert isinstance(encoding, Grouped)
        assert torch.equal(program.module.get_parameter("one.weight").detach(), encoding.decode())


def test_no_scale_goes_into_a_weight_coded_otherwise() -> None:
    program = make_chain()
    program.encode("one.weight", round_to_float(program.module.get_parameter("one.weight"), "fp16"))
    assert find_source(program, ["after_relu"], {"after_relu"}) is None
