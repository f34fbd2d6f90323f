"""Interleaved range asymmetric numeral systems (rANS): symbols in as many bits as their frequencies say.

Duda, Asymmetric numeral systems (2013); lanes as in Giesen, Interleaved entropy coders (2014). Symbol i belongs to lane
i % lanes, so that numpy handles a whole row of lanes at once. Only the encoder is here; load.py decodes.
"""

import numpy as np
from numpy.typing import NDArray

SYMBOLS_PER_LANE = 1024
"""A lane costs two bytes more than its symbols, a row of lanes one turn of the decoder's loop."""
MAX_LANES = 8192
LOWEST = 1 << 16
"""Every state is at least this between two symbols; each lane starts from it, so the decoder must end there."""
PRECISIONS = range(6, 15)
"""Bits of the quantized frequencies: more describe the symbols better, but make the table larger."""

Counts = NDArray[np.int64]


def count_lanes(num_symbols: int) -> int:
    """Return the number of lanes, which a reader derives in the same way."""
    return min(max(num_symbols // SYMBOLS_PER_LANE, 1), MAX_LANES)


def choose_frequencies(counts: Counts) -> tuple[NDArray[np.uint32], int, float]:
    """Return frequencies that add up to 2 ** precision, the precision, and the bits of the symbols and the table.

    `counts` are those of at least two different symbols. The precision is the one with the fewest bits in all.
    """
    used = counts > 0
    assert int(used.sum()) >= 2
    best: tuple[NDArray[np.uint32], int, float] | None = None
    for precision in PRECISIONS:
        if int(used.sum()) > 1 << precision:
            continue
        frequencies = _quantize(counts, precision)
        bits = float((counts[used] * (precision - np.log2(frequencies[used]))).sum()) + precision * len(counts)
        if best is None or bits < best[2]:
            best = frequencies.astype(np.uint32), precision, bits
    assert best is not None
    return best


def _quantize(counts: Counts, precision: int) -> Counts:
    """Return whole numbers near the counts' shares of 2 ** precision, none of a symbol that occurs below 1."""
    total = 1 << precision
    ideal = counts * (total / counts.sum())
    frequencies = np.where(counts > 0, np.maximum(np.floor(ideal), 1), 0).astype(np.int64)
    missing = total - int(frequencies.sum())
    if missing > 0:
        # Fewer are missing than there are symbols, because each was rounded down by less than one.
        largest = np.argsort(-(ideal - frequencies), kind="stable")[:missing]
        frequencies[largest] += 1
    for _ in range(-missing):
        able = frequencies > 1
        loss = counts[able] * np.log2(frequencies[able] / (frequencies[able] - 1))
        frequencies[np.flatnonzero(able)[np.argmin(loss)]] -= 1
    return frequencies


def encode(symbols: NDArray[np.uint8], frequencies: NDArray[np.uint32], precision: int) -> tuple[bytes, bytes]:
    """Return the lanes' states (u32 each) and the words (u16 each), little-endian, in the order of reading."""
    lanes = count_lanes(len(symbols))
    starts = np.zeros(len(frequencies), np.uint32)
    starts[1:] = np.cumsum(frequencies)[:-1]
    # A state at or above its symbol's limit would leave 32 bits; it gives off its lower 16 first.
    limits = (frequencies.astype(np.uint64) << np.uint64(32 - precision)).astype(np.uint32)
    states = np.full(lanes, LOWEST, np.uint32)
    words: list[NDArray[np.uint16]] = []
    for start in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        row = symbols[start : start + lanes]
        state = states[: len(row)]
        full = state >= limits[row]
        if full.any():
            words.append((state[full] & 0xFFFF).astype("<u2"))
            state = np.where(full, state >> 16, state)
        whole, rest = np.divmod(state, frequencies[row])
        states[: len(row)] = (whole << precision) + rest + starts[row]
    words.reverse()
    return states.astype("<u4").tobytes(), b"".join(each.tobytes() for each in words)
