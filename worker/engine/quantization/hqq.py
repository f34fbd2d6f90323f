"""Half-quadratic quantization: a grid that fits most weights well and gives up on outliers, without data.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023). There the zero point is a real
number and the scale stays; here zero points are integers, so that zero stays exactly on the grid, and the scale moves.
"""

import torch
from torch import Tensor

from worker.engine.packing.encodings import Grouped
from worker.engine.quantization.grids import SHRINKS, round_on
from worker.engine.quantization.rounding import choose_grid

Grid = tuple[Tensor, Tensor]
"""Scale and zero point of each group."""
NORM = 0.7
"""The p of sum |error| ** p: below 1, large errors of few weights count little."""
NUM_ROUNDS = 10
FIRST_STRENGTH = 10.0
STRENGTH_GROWTH = 1.1


def round_by_hqq(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> Grouped:
    """Return the weight rounded on grids that make sum |error| ** 0.7 of each group small.

    Neither that nor the sum of squares is larger than by rounding to nearest, in any group: without the second limit,
    at 4 bits, giving up on outliers costs a language model more than the finer grid gains. `weight` is (rows, ...).
    """
    matrix = weight.detach().float().reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    num_groups = -(-columns // group_size)
    padded = torch.nn.functional.pad(matrix, (0, num_groups * group_size - columns))
    groups = padded.reshape(rows, num_groups, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = _Best(groups, choose_grid(groups, bits, symmetric=symmetric), bits)
    for share in SHRINKS[2::2]:
        best.offer(choose_grid(groups.clamp(low * share, high * share), bits, symmetric=symmetric))
    _solve(groups, best, bits, symmetric=symmetric)
    scale, zero = best.grid
    return Grouped(
        codes=round_on(groups, scale, zero, bits).to(torch.uint8).reshape(rows, -1)[:, :columns].contiguous(),
        scales=scale.squeeze(-1),
        zero_points=None if symmetric else zero.squeeze(-1).to(torch.uint8),
        bits=bits,
        group_size=group_size,
        shape=tuple(weight.shape),
    )


def measure_norm(difference: Tensor) -> Tensor:
    """Return sum |error| ** 0.7 over the last axis, which is kept."""
    return difference.abs().pow(NORM).sum(-1, keepdim=True)


def _solve(groups: Tensor, best: "_Best", bits: int, *, symmetric: bool) -> None:
    scale, zero = best.grid
    # Strengths are for weights of unit size, whatever the unit.
    unit = groups.abs().mean(-1, keepdim=True).clamp(min=1e-30)
    strength = FIRST_STRENGTH
    for _ in range(NUM_ROUNDS):
        codes = round_on(groups, scale, zero, bits)
        # Half of the problem: the errors that stay are sparse ...
        outliers = _shrink((groups - (codes - zero) * scale) / unit, strength) * unit
        # ... and the grid fits the rest: zero point, then scale by least squares.
        rest = groups - outliers
        if not symmetric:
            zero = (codes - rest / scale).mean(-1, keepdim=True).round().clamp(0, 2**bits - 1)
        centred = codes - zero
        fitted = (centred * rest).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp(min=1e-30)
        scale = torch.where(fitted.abs() > 1e-30, fitted, scale)
        best.offer((scale, zero))
        strength *= STRENGTH_GROWTH


def _shrink(errors: Tensor, strength: float) -> Tensor:
    """Return the proximal step of |x| ** NORM (generalized soft thresholding)."""
    magnitude = errors.abs()
    threshold = magnitude.clamp(min=1e-8).pow(NORM - 1) / strength
    return errors.sign() * (magnitude - threshold).clamp(min=0)


class _Best:
    """The grid of each group with the smallest norm so far."""

    def __init__(self, groups: Tensor, grid: Grid, bits: int) -> None:
        self.grid = grid
        self._groups, self._bits = groups, bits
        errors = self._errors(grid)
        self._norm, self._limit = measure_norm(errors), _squares(errors)

    def offer(self, grid: Grid) -> None:
        """Take a grid where its norm is smaller, and its squared error no larger than that of the first grid."""
        errors = self._errors(grid)
        norm = measure_norm(errors)
        wins = (norm < self._norm) & (_squares(errors) <= self._limit)
        self.grid = torch.where(wins, grid[0], self.grid[0]), torch.where(wins, grid[1], self.grid[1])
        self._norm = torch.where(wins, norm, self._norm)

    def _errors(self, grid: Grid) -> Tensor:
        return self._groups - (round_on(self._groups, *grid, self._bits) - grid[1]) * grid[0]


def _squares(errors: Tensor) -> Tensor:
    return errors.square().sum(-1, keepdim=True)
