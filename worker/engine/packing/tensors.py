"""Tensors as bytes: every encoding, and plain numbers, without loss. load.py reads them back.

The one loss: a sparse float tensor stores no sign of its zeros, so that -0.0 (a pruned negative weight) becomes 0.0.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.packing.encodings import Codebook, Encoding, FixedPoint, FloatFormat, Floating, Grouped
from worker.engine.packing.streams import pack_symbols, pack_varint

RAW, SPARSE, CODEBOOK, GROUPED, FLOATING, FIXED_POINT = range(6)
"""How a tensor is stored, in the index of the file."""
FLOAT_FORMATS: tuple[FloatFormat, ...] = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2")
"""Numbered in this order."""
FEWEST_ZEROS = 0.05
"""Share of zeros below which a tensor without an encoding is not tried as a sparse one."""

Array = NDArray[Any]


def packed_bytes(encoding: Encoding) -> int:
    """Return how many bytes the encoding takes in a packed file, its index entry aside: exactly."""
    return len(pack_encoding(encoding)[1])


def pack_encoding(encoding: Encoding) -> tuple[int, bytes]:
    """Return how the encoding is stored, and the bytes."""
    match encoding:
        case Codebook():
            head = pack_varint(encoding.rows_per_codebook) + pack_varint(encoding.centroids.shape[1])
            indices = pack_symbols(_array(encoding.indices))
            return CODEBOOK, head + indices + pack_planes(_array(encoding.centroids))
        case Grouped():
            symmetric = encoding.zero_points is None
            head = bytes([encoding.bits | (0 if symmetric else 0x80)]) + pack_varint(encoding.group_size)
            codes = pack_symbols(_array(encoding.codes).reshape(encoding.shape))
            zeros = b"" if encoding.zero_points is None else pack_symbols(_array(encoding.zero_points))
            return GROUPED, head + codes + pack_planes(_array(encoding.scales)) + zeros
        case Floating():
            scaled = encoding.scales is not None
            head = bytes([FLOAT_FORMATS.index(encoding.format) | (0x80 if scaled else 0)])
            values = encoding.values.view(torch.uint8 if encoding.values.element_size() == 1 else torch.uint16)
            scales = b"" if encoding.scales is None else pack_planes(_array(encoding.scales))
            return FLOATING, head + _pack_numbers(_array(values), is_float=True) + scales
        case FixedPoint():
            signed = _array(encoding.codes).astype(np.int32)
            # Zigzag: small numbers of either sign become small.
            words = ((signed << 1) ^ (signed >> 31)).astype(np.uint8 if encoding.bits <= 8 else np.uint16)
            head = bytes([encoding.bits, encoding.fraction_bits & 0xFF])
            return FIXED_POINT, head + _pack_numbers(words, is_float=False)


def pack_plain(array: Array) -> tuple[int, bytes]:
    """Return how an array without an encoding is stored, and the bytes; RAW has none here, it goes into a pool."""
    if (
        array.dtype.kind == "f"
        and array.size
        and array.ndim
        and np.count_nonzero(array) <= (1 - FEWEST_ZEROS) * array.size
    ):
        sparse = _pack_numbers(_words(array), is_float=True)
        if len(sparse) < len(pack_planes(array)):
            return SPARSE, sparse
    return RAW, b""


def pack_pool(arrays: Iterable[Array]) -> bytes:
    """Return all raw arrays of one dtype as one, so that they share what entropy coding costs."""
    flat = [array.reshape(-1) for array in arrays]
    return pack_planes(np.concatenate(flat)) if flat else b""


def pack_planes(array: Array) -> bytes:
    """Return numbers as one stream per byte: the lowest bytes of all, the next of all, and so on.

    The sign of a float is made its lowest bit, so that its exponent is a byte of its own, which few values fill.
    """
    return _pack_words(_words(array), is_float=array.dtype.kind == "f")


def _pack_numbers(words: Array, *, is_float: bool) -> bytes:
    """Return words with or without a mask of those that are not zero, whichever is smaller."""
    dense = b"\x00" + (pack_symbols(words) if words.itemsize == 1 else _pack_words(words, is_float=is_float))
    kept = (words << 1 if is_float else words) != 0
    if words.itemsize == 1 or kept.mean() > 1 - FEWEST_ZEROS:
        return dense
    sparse = b"\x01" + pack_symbols(kept.astype(np.uint8)) + _pack_words(words[kept], is_float=is_float)
    return min(dense, sparse, key=len)


def _pack_words(words: Array, *, is_float: bool) -> bytes:
    flat = words.reshape(-1)
    bits = 8 * flat.itemsize
    if is_float:
        flat = (flat << 1) | (flat >> (bits - 1))
    return b"".join(pack_symbols((flat >> shift).astype(np.uint8)) for shift in range(0, bits, 8))


def _words(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array
