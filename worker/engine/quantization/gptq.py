"""GPTQ: rounding weights column by column, each error made good by the columns that are still to come.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022); the treatment
of pruned weights follows Frantar and Alistarh, SparseGPT (2023).
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from worker.engine.packing.encodings import Grouped
from worker.engine.quantization.grids import round_on, search_grid
from worker.engine.quantization.rounding import choose_grid, round_to_groups

BLOCK = 128
"""Columns whose errors reach the rest of the matrix together; group sizes divide it or are twice it."""


def round_by_gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    damping: float,
    mask: Tensor | None = None,
) -> tuple[Grouped, dict[str, float]]:
    """Return the weight in few bits with the smallest output error that was found, and the errors of what was tried.

    `weight` is (rows, ...), `gram` the sum of X^T X over the layer's inputs, (groups, features, features) with
    features = weight[0].numel(); group g is seen by the g-th block of rows. `mask` is False where a weight must stay
    zero. The names of the errors (sums of squares over all calibration rows): "rtn", the baseline, never lower than
    that of the result, and "chosen".
    """
    matrix = weight.detach().float().reshape(weight.shape[0], -1)
    kept = None if mask is None else mask.reshape(matrix.shape)
    plain = round_to_groups(weight, bits, group_size, symmetric=symmetric)
    if matrix.numel() == 0 or not bool(gram.any()):
        return plain, {"rtn": 0.0, "chosen": 0.0}
    factor = factorize(gram, damping)
    ordered = [_solve(matrix, kept, gram, factor, bits, group_size, symmetric, choose) for choose in (False, True)]
    candidates = [plain, *(replace(each, shape=plain.shape) for each in ordered)]
    errors = [output_error(matrix - each.decode().reshape(matrix.shape), gram) for each in candidates]
    chosen = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[chosen], {"rtn": errors[0], "chosen": errors[chosen]}


def output_error(difference: Tensor, gram: Tensor) -> float:
    """Return the squared error of a layer's outputs, summed over the calibration rows, for a change of its weight.

    `difference` is (rows, features).
    """
    split = difference.reshape(gram.shape[0], -1, gram.shape[-1])
    return float(((split @ gram) * split).sum(dtype=torch.float64).clamp(min=0))


def factorize(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped matrix, for each group."""
    damped = gram.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # A feature that is always zero tells nothing: it is rounded by itself.
    diagonal += torch.where(diagonal == 0, mean.clamp(min=1e-12), torch.zeros_like(diagonal))
    share = damping
    while True:
        diagonal += share * mean.clamp(min=1e-12)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(info.any()) and bool(upper.isfinite().all()):
                return cast(Tensor, upper)
        share *= 10


def _solve(
    matrix: Tensor,
    kept: Tensor | None,
    gram: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip: bool,
) -> Grouped:
    num_groups, num_features = gram.shape[0], gram.shape[-1]
    # (layer groups, rows of one, features)
    weight = matrix.reshape(num_groups, -1, num_features).clone()
    alive = None if kept is None else kept.reshape(weight.shape)
    importance = gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    block_size = max(BLOCK, group_size)
    for start in range(0, num_features, block_size):
        stop = min(start + block_size, num_features)
        block = weight[:, :, start:stop]
        errors = torch.zeros_like(block)
        local = factor[:, start:stop, start:stop]
        for column in range(stop - start):
            if column % group_size == 0:
                # On the weights as they are by now, with the errors of all earlier columns made good.
                group = block[:, :, column : column + group_size]
                if alive is not None:
                    group = group * alive[:, :, start + column : start + column + group_size]
                span = slice(start + column, start + column + group.shape[-1])
                if clip:
                    scale, zero = search_grid(group, bits, symmetric=symmetric, importance=importance[:, :, span])
                else:
                    scale, zero = choose_grid(group, bits, symmetric=symmetric)
                scales.append(scale)
                zeros.append(zero)
            values = block[:, :, column : column + 1]
            code = round_on(values, scale, zero, bits)
            if alive is not None:
                code = torch.where(alive[:, :, start + column : start + column + 1], code, zero)
            codes[:, :, start + column] = code.squeeze(-1).to(torch.uint8)
            error = (values - (code - zero) * scale) / local[:, column, column, None, None]
            errors[:, :, column : column + 1] = error
            block[:, :, column + 1 :] -= error * local[:, column, None, column + 1 :]
        if stop < num_features:
            weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    rows = matrix.shape[0]
    return Grouped(
        codes=codes.reshape(rows, num_features),
        scales=torch.cat(scales, -1).reshape(rows, -1),
        zero_points=None if symmetric else torch.cat(zeros, -1).reshape(rows, -1).to(torch.uint8),
        bits=bits,
        group_size=group_size,
        shape=tuple(matrix.shape),
    )
