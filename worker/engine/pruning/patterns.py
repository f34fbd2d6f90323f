"""Rows of weights: a layer's weight as a matrix, whatever the layer, and n of every m kept along its rows.

Every weight is seen in the canonical order (outputs, inputs of the group, *kernel), the order of nn.Linear and of
convolutions. Transposed convolutions store (inputs, outputs of the group, *kernel); recurrent ones are matrices.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.pruning.masks import TRANSPOSED

Axis = Literal["input", "output"]


def to_canonical(layer: nn.Module, values: Tensor) -> Tensor:
    """Return values of the weight's shape as (outputs, inputs of the group, *kernel)."""
    if not isinstance(layer, TRANSPOSED):
        return values
    groups = layer.groups
    inputs, outputs, *kernel = values.shape
    parts = values.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return parts.reshape(groups * outputs, inputs // groups, *kernel)


def from_canonical(layer: nn.Module, values: Tensor) -> Tensor:
    """Undo `to_canonical`."""
    if not isinstance(layer, TRANSPOSED):
        return values
    groups = layer.groups
    outputs, inputs, *kernel = values.shape
    parts = values.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
    return parts.reshape(groups * inputs, outputs // groups, *kernel)


def row_width(layer: nn.Module, weight: Tensor, axis: Axis) -> int:
    """Return how many neighbouring weights one row of `to_rows` has."""
    return int(to_canonical(layer, weight).shape[1 if axis == "input" else 0])


def to_rows(layer: nn.Module, values: Tensor, axis: Axis) -> Tensor:
    """Return values of the weight's shape as a matrix whose rows run along an axis of the layer.

    Input axis: one row per output and kernel position, along the input channels of the group: the K axis of the matrix
    product that a convolution becomes, which is what sparse tensor cores need. Output axis: one row per input and
    kernel position, along the outputs.
    """
    canonical = to_canonical(layer, values).movedim(1 if axis == "input" else 0, -1)
    return canonical.reshape(-1, canonical.shape[-1])


def from_rows(layer: nn.Module, rows: Tensor, shape: torch.Size, axis: Axis) -> Tensor:
    """Undo `to_rows` for a weight of this shape."""
    moved = to_canonical(layer, torch.empty(shape, device="meta")).movedim(1 if axis == "input" else 0, -1).shape
    return from_canonical(layer, rows.reshape(moved).movedim(-1, 1 if axis == "input" else 0))


def keep_n_of_m(rows: Tensor, n: int, m: int) -> Tensor:
    """Return a bool mask of the shape of `rows` (num_rows, width) that keeps the n largest of every m neighbours.

    A last block shorter than m counts as filled up with zeros: it keeps n too. Among equals the earlier are kept.
    """
    num_rows, width = rows.shape
    blocks = math.ceil(width / m)
    filled = functional.pad(rows, (0, blocks * m - width), value=-math.inf).reshape(num_rows * blocks, m)
    best = torch.sort(filled, dim=1, descending=True, stable=True).indices[:, :n]
    kept = torch.zeros_like(filled, dtype=torch.bool).scatter_(1, best, True)
    return kept.reshape(num_rows, blocks * m)[:, :width]


def follows_n_of_m(rows: Tensor, n: int, m: int) -> bool:
    """Return whether no block of m neighbours in a row has more than n values that are not zero."""
    filled = functional.pad((rows != 0).int(), (0, -rows.shape[1] % m))
    return int(filled.reshape(-1, m).sum(1).max()) <= n


def keep_share_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Return a bool mask of (outputs, weights of one output) that drops the same number of weights in every row.

    That is round(sparsity * width), or all scores below zero (pruned before) where they are more. The smallest go;
    among equals, the earlier.
    """
    count = round(sparsity * scores.shape[1])
    order = torch.sort(scores, dim=1, stable=True).indices
    kept = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)
    return kept & (scores >= 0)
