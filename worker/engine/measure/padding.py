"""Which positions of an output are padding: where the program's mask is zero, its outputs mean nothing.

A model is free to put anything at padded positions (BERT-type encoders do), and rounding moves it freely. Comparing
outputs there says nothing about quality, and drowns what does.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MASK_ENDINGS = ("mask", "masks")


def find_mask(names: Sequence[str], inputs: Sequence[NDArray[np.generic]]) -> NDArray[np.bool_] | None:
    """Return the padding mask among a call's inputs, (batch, positions), False at padding; None where there is none.

    It is the input whose name ends with "mask", that has two axes and holds zeros and ones, a one in each row.
    """
    for name, array in zip(names, inputs, strict=True):
        if not name.lower().endswith(MASK_ENDINGS) or array.ndim != 2 or array.dtype.kind not in "biuf":
            continue
        mask = array != 0
        if np.array_equal(mask, array) and mask.any(1).all():
            return np.asarray(mask)
    return None


def clear_padding(output: NDArray[np.generic], mask: NDArray[np.bool_] | None) -> NDArray[np.generic]:
    """Return the output with zeros at padded positions, if it has a value per position: (batch, positions, ...)."""
    if mask is None or output.shape[:2] != mask.shape:
        return output
    return np.where(mask.reshape(*mask.shape, *[1] * (output.ndim - 2)), output, np.zeros((), output.dtype))
