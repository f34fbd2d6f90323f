"""Rounding without data: bounds of the error, codes in range, zeros that stay, formats that are torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.engine.packing.encodings import FLOAT_TYPES, FloatFormat, Grouped
from worker.engine.quantization.grids import round_on, search_grid
from worker.engine.quantization.hqq import measure_norm, round_by_hqq
from worker.engine.quantization.rounding import choose_grid, round_to_fixed, round_to_float, round_to_groups

FORMATS: list[FloatFormat] = ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]


def make_weight(rows: int, columns: int, seed: int, *, tails: float = 1.0) -> Tensor:
    """Return normal weights to a power, some of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight.sign() * weight.abs() ** tails
    return weight * (torch.rand(rows, columns, generator=generator) > 0.3)


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.integers(2, 8), symmetric=st.booleans(),
    group_size=st.sampled_from([16, 32, 64]), unit=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_groups_round_to_the_nearest_code_and_keep_zeros(
    rows: int, columns: int, bits: int, symmetric: bool, group_size: int, unit: float, seed: int
) -> None:
    weight = make_weight(rows, columns, seed) * unit
    found = round_to_groups(weight, bits, group_size, symmetric=symmetric)
    values = found.decode()
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) < 2**bits
    assert found.scales.shape == (rows, -(-columns // group_size))
    assert bool((values[weight == 0] == 0).all())
    scales = found.scales.repeat_interleave(group_size, 1)[:, :columns].abs()
    error = (values - weight).abs() / scales
    if symmetric:
        # Beyond the last code above zero there may be one whole scale.
        reach = weight / found.scales.repeat_interleave(group_size, 1)[:, :columns] <= 2 ** (bits - 1) - 1
        assert bool((error[reach] <= 0.5 + 1e-4).all())
        assert bool((error <= 1 + 1e-4).all())
        assert found.zero_points is None
    else:
        assert bool((error <= 0.5 + 1e-4).all())
        assert found.zero_points is not None
        assert int(found.zero_points.max()) < 2**bits


def test_a_group_of_zeros_and_of_one_sign_are_no_special_cases() -> None:
    for symmetric in (False, True):
        zeros = round_to_groups(torch.zeros(2, 20), 4, 16, symmetric=symmetric)
        assert torch.equal(zeros.decode(), torch.zeros(2, 20))
        positive = torch.linspace(1, 2, 16)[None]
        assert float((round_to_groups(positive, 4, 16, symmetric=symmetric).decode() - positive).abs().max()) < 0.26


def test_the_symmetric_grid_uses_its_odd_code() -> None:
    # With a scale of largest / 7 the errors of 4-bit normal weights would be a quarter larger.
    groups = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    for bits, share in ((2, 0.35), (3, 0.7), (4, 0.85)):
        scale, zero = choose_grid(groups, bits, symmetric=True)
        plain = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        errors = [
            float(((round_on(groups, each, zero, bits) - zero) * each - groups).square().mean())
            for each in (scale, plain)
        ]
        assert errors[0] < share * errors[1]


@given(bits=st.integers(2, 4), symmetric=st.booleans(), seed=st.integers(0, 50), tails=st.sampled_from([1.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_clipping_never_raises_the_squared_error(bits: int, symmetric: bool, seed: int, tails: float) -> None:
    groups = make_weight(8, 32, seed, tails=tails)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed))
    before, after = (
        (((round_on(groups, *grid, bits) - grid[1]) * grid[0] - groups).square() * importance).sum(-1)
        for grid in (
            choose_grid(groups, bits, symmetric=symmetric),
            search_grid(groups, bits, symmetric=symmetric, importance=importance),
        )
    )
    assert bool((after <= before).all())


def test_clipping_gains_at_two_bits() -> None:
    groups = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before, after = (
        float(((round_on(groups, *grid, 2) - grid[1]) * grid[0] - groups).square().sum())
        for grid in (choose_grid(groups, 2, symmetric=False), search_grid(groups, 2, symmetric=False))
    )
    assert after < 0.8 * before


def _norms(weight: Tensor, found: Grouped) -> Tensor:
    rows, columns = found.codes.shape
    difference = torch.nn.functional.pad(weight - found.decode(), (0, -columns % found.group_size))
    return measure_norm(difference.reshape(rows, -1, found.group_size))


@given(
    bits=st.integers(2, 4), symmetric=st.booleans(), seed=st.integers(0, 50), tails=st.sampled_from([1.0, 2.5]),
    columns=st.integers(1, 80),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_hqq_is_never_worse_than_rtn_in_its_norm(
    bits: int, symmetric: bool, seed: int, tails: float, columns: int
) -> None:
    weight = make_weight(6, columns, seed, tails=tails)
    plain = round_to_groups(weight, bits, 32, symmetric=symmetric)
    found = round_by_hqq(weight, bits, 32, symmetric=symmetric)
    assert bool((_norms(weight, found) <= _norms(weight, plain) * (1 + 1e-5)).all())
    assert bool((found.decode()[weight == 0] == 0).all())
    assert int(found.codes.max()) < 2**bits


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.95)])
def test_hqq_gains_in_its_norm_and_loses_nothing_in_squares(bits: int, share: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain = round_to_groups(weight, bits, 64, symmetric=False)
    found = round_by_hqq(weight, bits, 64, symmetric=False)
    assert float(_norms(weight, found).sum()) < share * float(_norms(weight, plain).sum())
    squares = [(weight - each.decode()).square().reshape(64, 4, 64).sum(-1) for each in (found, plain)]
    assert bool((squares[0] <= squares[1] * (1 + 1e-5)).all())


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_sixteen_bits_are_torch_s_casts(format: FloatFormat) -> None:
    weight = make_weight(7, 33, 1) * 3
    found = round_to_float(weight, format)
    assert found.scales is None
    assert torch.equal(found.decode(), weight.to(FLOAT_TYPES[format]).float())


def test_half_precision_saturates_instead_of_overflowing() -> None:
    found = round_to_float(torch.tensor([[1e6, -1e6, 1.0]]), "fp16")
    assert torch.equal(found.decode(), torch.tensor([[65504.0, -65504.0, 1.0]]))


@given(
    format=st.sampled_from(["fp8_e4m3", "fp8_e5m2"]), unit=st.sampled_from([1e-20, 1.0, 1e20]), seed=st.integers(0, 20)
)
@settings(max_examples=30, deadline=None)
def test_eight_bit_rows_fill_the_format(format: FloatFormat, unit: float, seed: int) -> None:
    weight = make_weight(5, 40, seed) * unit
    found = round_to_float(weight, format)
    assert found.scales is not None
    largest = torch.finfo(FLOAT_TYPES[format]).max
    assert torch.equal(found.values.float().abs().amax(1), torch.full((5,), largest))
    relative = torch.finfo(FLOAT_TYPES[format]).eps / 2
    smallest = torch.finfo(FLOAT_TYPES[format]).smallest_normal * found.scales[:, None]
    normal = weight.abs() >= smallest
    assert bool(((found.decode() - weight).abs()[normal] <= weight.abs()[normal] * relative * 1.001).all())
    assert bool((found.decode()[weight == 0] == 0).all())


@given(
    bits=st.integers(2, 16),
    fraction=st.one_of(st.none(), st.integers(-8, 20)),
    unit=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 30),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_fixed_point_is_within_half_a_unit_or_saturated(
    bits: int, fraction: int | None, unit: float, seed: int
) -> None:
    weight = make_weight(4, 30, seed) * unit
    found = round_to_fixed(weight, bits, fraction)
    step = 2.0**-found.fraction_bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert int(found.codes.min()) >= low
    assert int(found.codes.max()) <= high
    inside = (weight <= high * step) & (weight >= low * step)
    assert bool(((found.decode() - weight).abs()[inside] <= step / 2).all())
    assert bool((found.decode()[weight > high * step] == high * step).all())
    assert bool((found.decode()[weight < low * step] == low * step).all())
    assert bool((found.decode()[weight == 0] == 0).all())
    if fraction is None:
        assert bool((weight.abs() <= high * step).all())
        assert float(weight.abs().max()) > high * step / 2.001
