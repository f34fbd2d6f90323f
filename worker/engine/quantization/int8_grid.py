"""The 8-bit (and 7-bit) integer grids of weights: symmetric, one scale per channel or one for all."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SMALLEST_STEP = 1e-30
"""Between two levels of activations: a row of zeros would be divided by zero."""


def largest_code(bits: int) -> int:
    """Return the largest magnitude a weight may have. 7 bits allow 64: 2 * 255 * 64 still fits 16 signed bits."""
    return 127 if bits == 8 else 64


def round_to_int8(
    weight: NDArray[Any], axis: int | None, bits: int = 8, scales: Floats | None = None
) -> tuple[NDArray[np.int8], Floats]:
    """Return codes and scales, `weight ~ codes * scales`, each error at most half a scale.

    `axis` has a scale for each of its entries (the scales keep the weight's rank, with ones elsewhere); None: one scale
    for all, a scalar. A channel of zeros gets scale 1. Zero is exact. `scales` (a flat array): use these; with one for
    all, all are the same.
    """
    values = np.asarray(weight, np.float32)
    others = None if axis is None else tuple(each for each in range(values.ndim) if each != axis % values.ndim)
    largest = np.abs(values).max(axis=others, keepdims=axis is not None, initial=0)
    limit = largest_code(bits)
    if scales is None:
        chosen = np.asarray(largest / np.float32(limit), np.float32)
        chosen = np.where(chosen > 0, chosen, np.float32(1)).astype(np.float32)
    else:
        chosen = np.asarray(scales[0] if axis is None else scales.reshape(largest.shape), np.float32)
    codes = np.clip(np.rint(values / chosen), -limit, limit).astype(np.int8)
    return codes, chosen
