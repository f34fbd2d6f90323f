"""Choosing a finer grid than the one that spans a group: clip the largest weights when that lowers the error."""

import torch
from torch import Tensor

from worker.engine.quantization.rounding import choose_grid

SHRINKS = tuple(1 - 0.05 * step for step in range(13))
"""Shares of a group's range that are tried: 1 down to 0.4."""


def search_grid(
    groups: Tensor, bits: int, *, symmetric: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, (..., 1), with the smallest weighted squared rounding error of each group.

    `groups` is (..., group_size), `importance` of a shape that spreads to it, e.g. the mean square of each input. The
    grid that spans the whole group is among those tried, so the error is never larger than with `choose_grid`.
    """
    scale, zero = choose_grid(groups, bits, symmetric=symmetric)
    best_scale, best_zero, best = scale, zero, _error(groups, scale, zero, bits, importance)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for share in SHRINKS[1:]:
        scale, zero = choose_grid(groups.clamp(low * share, high * share), bits, symmetric=symmetric)
        error = _error(groups, scale, zero, bits, importance)
        better = error < best
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best = torch.where(better, error, best)
    return best_scale, best_zero


def round_on(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes, as floats, of the nearest values on a grid."""
    return (values / scale + zero).round_().clamp_(0, 2**bits - 1)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    difference = ((round_on(groups, scale, zero, bits) - zero) * scale - groups).square_()
    if importance is not None:
        difference *= importance
    return difference.sum(-1, keepdim=True)
