"""Streams of symbols, each in the smallest of four forms. docs/packed-format.md says what each byte means."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.packing import rans

CONSTANT, BITS, RANS, N_M = range(4)
"""The lower four bits of a stream's first byte."""
BLOCK_SIZES = (2, 4, 8, 16)
"""Sizes m of blocks that are tried for the pattern n of every m."""
MAX_PATTERNS = 256
FEWEST_FOR_PATTERNS = 0.2
"""Share of the most frequent symbol below which patterns are not tried."""
_CHUNK = 1 << 20
"""Symbols turned into bits at a time; a multiple of eight, so that a chunk ends with a byte."""

Symbols = NDArray[np.uint8]


@dataclass(frozen=True)
class _Pattern:
    """At most n of every m neighbours along an axis are not the frequent symbol."""

    axis: int
    m: int
    n: int


def pack_symbols(symbols: Symbols) -> bytes:
    """Return a stream. The reader must know how many symbols there are, and their shape: nothing of it is stored."""
    flat = np.ascontiguousarray(symbols).reshape(-1)
    if not flat.size:
        return b""
    counts = np.bincount(flat, minlength=256)
    forms = [_pack_simply(flat, counts)]
    frequent = int(counts.argmax())
    if symbols.ndim >= 2 and FEWEST_FOR_PATTERNS <= counts[frequent] / flat.size < 1:
        forms += [_pack_pattern(symbols, frequent, pattern) for pattern in _find_patterns(symbols != frequent)]
    return min(forms, key=len)


def pack_varint(value: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first; a set eighth bit says that more follow."""
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(groups) + bytes([value])


def pack_bits(values: NDArray[np.integer], width: int) -> bytes:
    """Return whole numbers below 2 ** width, one after the other, lowest bit first, filled up to whole bytes."""
    packed = []
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].astype(np.uint16)
        bits = (chunk[:, None] >> np.arange(width, dtype=np.uint16)) & 1
        packed.append(np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes())
    return b"".join(packed)


def _pack_simply(flat: Symbols, counts: NDArray[np.int64]) -> bytes:
    used = np.flatnonzero(counts)
    lowest, highest = int(used[0]), int(used[-1])
    if lowest == highest:
        return bytes([CONSTANT, lowest])
    width = highest.bit_length()
    num_bytes = 1 + -(-flat.size * width // 8)
    frequencies, precision, bits = rans.choose_frequencies(counts[lowest : highest + 1])
    if bits / 8 < num_bytes:
        states, words = rans.encode(flat - np.uint8(lowest), frequencies, precision)
        entropy_coded = (
            bytes([RANS | precision << 4, lowest, highest - lowest])
            + pack_bits(frequencies, precision)
            + states
            + pack_varint(len(words) // 2)
            + words
        )
        if len(entropy_coded) < num_bytes:
            return entropy_coded
    packed = flat.tobytes() if width == 8 else pack_bits(flat, width)
    return bytes([BITS | width << 4]) + packed


def _pack_plain(symbols: Symbols) -> bytes:
    """Return a stream within a stream, which is never of a form that holds streams."""
    return _pack_simply(symbols, np.bincount(symbols, minlength=256)) if symbols.size else b""


def _find_patterns(rare: NDArray[np.bool_]) -> list[_Pattern]:
    """Return the patterns n of m that hold and have few enough ways to fill a block."""
    found = []
    for axis in range(min(rare.ndim, 2)):
        for m in BLOCK_SIZES:
            if m <= rare.shape[axis]:
                n = int(_to_blocks(rare, axis, m).sum(-1).max())
                if 0 < n < m and math.comb(m, n) <= MAX_PATTERNS:
                    found.append(_Pattern(axis, m, n))
    return found


def _pack_pattern(symbols: Symbols, frequent: int, pattern: _Pattern) -> bytes:
    blocks = _to_blocks(symbols, pattern.axis, pattern.m, fill=frequent)
    # The rare symbols of a block, and where they are fewer than n, frequent ones before others.
    chosen = np.sort(np.argsort(blocks == frequent, axis=1, kind="stable")[:, : pattern.n], axis=1)
    numbers = np.zeros(1 << pattern.m, np.uint8)
    for number, places in enumerate(itertools.combinations(range(pattern.m), pattern.n)):
        numbers[sum(1 << place for place in places)] = number
    kept = np.take_along_axis(blocks, chosen, 1)
    return (
        bytes([N_M | pattern.axis << 4, frequent, pattern.m, pattern.n])
        + _pack_plain(numbers[(1 << chosen).sum(1)])
        + _pack_plain(kept.reshape(-1))
    )


def _to_blocks(values: NDArray[Any], axis: int, m: int, fill: int = 0) -> NDArray[Any]:
    """Return (blocks, m): neighbours along the axis, the last block of each row filled up."""
    moved = np.moveaxis(values, axis, -1)
    filled = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % m)], constant_values=fill)
    return filled.reshape(-1, m)
