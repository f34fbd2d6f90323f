"""Several codes in one byte."""

import numpy as np
from numpy.typing import NDArray


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the last axis in bytes of 8 // bits codes each, the first in the lowest bits; `bits` is 1, 2, 4 or 8."""
    count = 8 // bits
    missing = -codes.shape[-1] % count
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    packed = np.zeros((*padded.shape[:-1], padded.shape[-1] // count), np.uint8)
    for index in range(count):
        packed |= padded[..., index::count] << np.uint8(index * bits)
    return packed
