"""What the packer writes, load.py reads back bit for bit; and the predicted size is the real one."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.engine import load
from worker.engine.packing import rans
from worker.engine.packing.encodings import FLOAT_TYPES, Codebook, Encoding, FixedPoint, FloatFormat, Floating
from worker.engine.packing.streams import N_M, RANS, pack_symbols
from worker.engine.packing.tensors import FLOAT_FORMATS, SPARSE, pack_encoding, pack_plain, pack_planes, packed_bytes
from worker.engine.quantization.rounding import round_to_fixed, round_to_float, round_to_groups

QUICK = settings(max_examples=40, deadline=None)
SHAPES = st.sampled_from([(1,), (1, 1), (5,), (1, 7), (7, 1), (4, 6), (3, 4, 3, 3), (16, 33), (40, 64)])


def read_symbols(data: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
    reader = load._Reader(data)
    symbols = load._read_symbols(reader, shape)
    assert reader.position == len(data)
    return symbols


def read_tensor(coding: int, data: bytes, shape: tuple[int, ...], dtype: str = "<f4") -> NDArray[Any]:
    reader = load._Reader(data)
    array = load._read_tensor(reader, coding, shape, np.dtype(dtype), 1 << 30).reshape(shape)
    assert reader.position == len(data)
    return array


def check(encoding: Encoding) -> None:
    expected = encoding.decode().numpy()
    coding, data = pack_encoding(encoding)
    actual = read_tensor(coding, data, expected.shape)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))
    assert packed_bytes(encoding) == len(data)


def make_weight(shape: tuple[int, ...], seed: int, zeros: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    return weight * (torch.rand(shape, generator=generator) >= zeros)


WEIGHTS = st.builds(make_weight, SHAPES, st.integers(0, 99), st.sampled_from([0.0, 0.5, 0.95, 1.0]))


@given(
    size=st.integers(1, 5000),
    alphabet=st.integers(1, 256),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    seed=st.integers(0, 99),
)
@QUICK
def test_streams(size: int, alphabet: int, power: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = (np.arange(alphabet) + 1.0) ** -power
    symbols = rng.choice(alphabet, size, p=shares / shares.sum()).astype(np.uint8)
    np.testing.assert_array_equal(read_symbols(pack_symbols(symbols), (size,)), symbols)


@given(weight=WEIGHTS, bits=st.integers(1, 8), rows=st.integers(1, 50), seed=st.integers(0, 9))
@QUICK
def test_codebooks(weight: torch.Tensor, bits: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebooks = -(-weight.shape[0] // rows)
    indices = torch.randint(0, 2**bits, weight.shape, generator=generator, dtype=torch.uint8)
    indices[weight == 0] = 0
    check(Codebook(indices, torch.randn(codebooks, 2**bits, generator=generator), rows))


def test_a_codebook_of_one_cluster() -> None:
    check(Codebook(torch.zeros(3, 4, dtype=torch.uint8), torch.full((1, 1), 0.5), 3))


@given(weight=WEIGHTS, bits=st.integers(2, 8), group=st.integers(1, 70), symmetric=st.booleans())
@QUICK
def test_groups(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> None:
    check(round_to_groups(weight, bits, group, symmetric=symmetric))


@given(weight=WEIGHTS, format=st.sampled_from(FLOAT_FORMATS))
@QUICK
def test_floating_point(weight: torch.Tensor, format: FloatFormat) -> None:
    encoding = round_to_float(weight, format)
    # A pruned negative weight is -0.0, whose sign a sparse tensor does not store.
    check(Floating((encoding.values.float() + 0.0).to(encoding.values.dtype), format, encoding.scales))


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_every_value_of_8_bit_floats(format: FloatFormat) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT_TYPES[format])
    coding, data = pack_encoding(Floating(values, format, None))
    np.testing.assert_array_equal(read_tensor(coding, data, (256,)), values.float().numpy())


@given(weight=WEIGHTS, bits=st.integers(2, 16), fraction=st.none() | st.integers(-32, 47))
@QUICK
def test_fixed_point(weight: torch.Tensor, bits: int, fraction: int | None) -> None:
    check(round_to_fixed(weight, bits, fraction))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    check(FixedPoint(torch.tensor([[lowest, 0, highest]], dtype=torch.int16), bits, -3))


@given(weight=WEIGHTS, dtype=st.sampled_from(["<f2", "<f4", "<f8"]))
@QUICK
def test_plain_numbers(weight: torch.Tensor, dtype: str) -> None:
    array = (weight.numpy() + 0.0).astype(dtype)
    reader = load._Reader(pack_planes(array))
    np.testing.assert_array_equal(load._read_planes(reader, array.shape, array.dtype), array)
    coding, data = pack_plain(array)
    if coding == SPARSE:
        np.testing.assert_array_equal(read_tensor(coding, data, array.shape, dtype), array)


def test_special_numbers_keep_their_bits() -> None:
    array = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.4e38], np.float32)
    read = load._read_planes(load._Reader(pack_planes(array)), array.shape, array.dtype)
    np.testing.assert_array_equal(read.view(np.uint32), array.view(np.uint32))


@pytest.mark.parametrize(("axis", "n", "m"), [(0, 2, 4), (1, 2, 4), (1, 1, 4), (0, 1, 16)])
@pytest.mark.parametrize("shape", [(32, 48), (34, 35), (16, 20, 3, 3)])
def test_patterns_n_of_m_cost_less_than_entropy(axis: int, n: int, m: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 4, shape).astype(np.uint8)
    moved = np.moveaxis(codes, axis, -1)
    for start in range(0, moved.shape[-1], m):
        block = moved[..., start : start + m]
        if block.shape[-1] > n:
            drop = rng.permuted(np.broadcast_to(np.arange(block.shape[-1]) < block.shape[-1] - n, block.shape), axis=-1)
            block[drop] = 0
    data = pack_symbols(codes)
    np.testing.assert_array_equal(read_symbols(data, shape), codes)
    assert data[0] & 15 == N_M
    assert len(data) < len(pack_symbols(codes.reshape(-1)))


def test_entropy_coding_is_near_the_entropy() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.8, 0.1, 0.05, 0.03, 0.02])
    symbols = rng.choice(5, 100_000, p=shares).astype(np.uint8)
    observed = np.bincount(symbols) / len(symbols)
    entropy = -(observed * np.log2(observed)).sum() * len(symbols) / 8
    data = pack_symbols(symbols)
    assert data[0] & 15 == RANS
    assert entropy < len(data) < 1.02 * entropy + 50


@given(counts=st.lists(st.integers(0, 10**6), min_size=2, max_size=256).filter(lambda c: sum(map(bool, c)) >= 2))
@QUICK
def test_frequencies_add_up_and_none_in_use_is_zero(counts: list[int]) -> None:
    frequencies, precision, _ = rans.choose_frequencies(np.array(counts, np.int64))
    assert int(frequencies.sum()) == 1 << precision
    assert [bool(f) for f in frequencies] == [bool(c) for c in counts]
