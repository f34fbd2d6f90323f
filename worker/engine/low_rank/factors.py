"""Factors of one layer: the spectrum that says what each rank costs in error, and the smaller layers of a chosen rank.

A Gram matrix X^T X of the layer's input rows (damped) makes the error that of the layer's outputs, else it is that of
the weights. Errors are relative and squared: ||(W - Wr) X||^2 / ||W X||^2.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DAMPING = 1e-3
"""Added to the diagonal of a Gram matrix, as a share of its mean."""
NUM_SWEEPS = 5
"""Of higher-order orthogonal iteration (HOOI)."""
Kind = Literal["matrix", "spatial", "tucker2"]


@dataclass(frozen=True)
class Option:
    """One choice of ranks."""

    ranks: tuple[int, ...]
    """(rank,), or of Tucker-2 (input rank, output rank)."""
    num_weights: int
    """Of all factors, biases aside."""
    error: float
    """Relative squared error; of Tucker-2 the bound that the two spectra give."""


class Factors:
    """The decomposition of one layer's weight."""

    def __init__(self, layer: nn.Module, kind: Kind, gram: Tensor | None = None) -> None:
        assert isinstance(layer.weight, Tensor)
        self.layer, self.kind = layer, kind
        self.weight = layer.weight.detach().double()
        self.num_weights = self.weight.numel()
        self.gram = None if gram is None else damp(gram.double())
        if kind == "tucker2":
            tensor = self.weight.flatten(2)
            channels = _scale_channels(tensor, self.gram)
            outputs = tensor.flatten(1) if self.gram is None else tensor.flatten(1) @ _root(self.gram)[0]
            self.spectra = tuple(_eigen(each)[0] for each in (channels, outputs))
        else:
            matrix = self.weight.flatten(1) if kind == "matrix" else _unfold_spatial(self.weight)
            self._sides = matrix.shape
            self._inverse: Tensor | None = None
            if kind == "matrix" and self.gram is not None:
                root, self._inverse = _root(self.gram)
                matrix = matrix @ root
            self._u, self._s, self._v = _thin_svd(matrix)
            self.spectra = (self._s.square(),)

    @property
    def options(self) -> list[Option]:
        """Return every useful choice that has fewer weights than the layer, the smallest first."""
        tails = [_tail_shares(each) for each in self.spectra]
        if self.kind != "tucker2":
            step = sum(self._sides)
            most = min(len(self._s), (self.num_weights - 1) // step)
            return [Option((r,), r * step, float(tails[0][r])) for r in range(1, most + 1)]
        ranks_in, ranks_out = np.meshgrid(
            np.arange(1, len(tails[0])), np.arange(1, len(tails[1])), indexing="ij", copy=False
        )
        sizes = self.count((ranks_in, ranks_out))
        errors = tails[0][1:, None] + tails[1][None, 1:]
        order = np.lexsort((errors.ravel(), sizes.ravel()))
        order = order[sizes.ravel()[order] < self.num_weights]
        least = np.minimum.accumulate(np.concatenate([[np.inf], errors.ravel()[order]]))
        return [
            Option((int(ranks_in.flat[i]), int(ranks_out.flat[i])), int(sizes.flat[i]), float(errors.flat[i]))
            for i in order[least[1:] < least[:-1]]
        ]

    def count(self, ranks: tuple[Any, ...]) -> Any:
        """Return the weights of all factors with these ranks, which may be arrays."""
        if self.kind != "tucker2":
            return ranks[0] * sum(self._sides)
        outputs, inputs, *kernel = self.weight.shape
        return ranks[0] * inputs + ranks[0] * ranks[1] * int(np.prod(kernel)) + ranks[1] * outputs

    def limit(self, rank: int) -> tuple[int, ...]:
        """Return the same rank for every spectrum, no more than each has."""
        return tuple(min(rank, len(each)) for each in self.spectra)

    def reach(self, energy: float) -> tuple[int, ...]:
        """Return the smallest ranks that keep this share of every spectrum."""
        return tuple(
            min(len(each), 1 + int((_tail_shares(each)[1:] > 1 - energy + 1e-12).sum())) for each in self.spectra
        )

    def factorize(self, ranks: tuple[int, ...]) -> tuple[list[Tensor], float]:
        """Return the factors' weights, shaped as their layers', in the order of the data, and the relative error."""
        if self.kind == "tucker2":
            factors, product = self._tucker(*ranks)
        elif self.kind == "spatial":
            factors, product = self._spatial(ranks[0])
        else:
            scale = self._s[: ranks[0]].sqrt()
            first, second = scale[:, None] * self._v[: ranks[0]], self._u[:, : ranks[0]] * scale
            if self._inverse is not None:
                first = first @ self._inverse
            product = second @ first
            ones = [1] * (self.weight.ndim - 2)
            factors = [each.reshape(*each.shape, *ones) for each in (first, second)]
        return factors, self.error_of(product)

    def error_of(self, product: Tensor) -> float:
        """Return the relative squared error of a weight (outputs, all inputs) in place of the layer's."""
        flat = self.weight.flatten(1)
        difference = flat - product
        if self.gram is None:
            size = flat.square().sum()
            return float(difference.square().sum() / size) if size else 0.0
        size = ((flat @ self.gram) * flat).sum()
        return float(((difference @ self.gram) * difference).sum() / size) if size else 0.0

    def _spatial(self, rank: int) -> tuple[list[Tensor], Tensor]:
        outputs, inputs, height, width = self.weight.shape
        scale = self._s[:rank].sqrt()
        first = (scale[:, None] * self._v[:rank]).reshape(rank, inputs, height)
        second = (self._u[:, :rank] * scale).reshape(outputs, width, rank).transpose(1, 2)
        spread = torch.einsum("rci,jk->rjcik", first, torch.eye(width, dtype=first.dtype))
        spread = spread.reshape(rank * width, -1)
        if self.gram is not None:
            # Given the first factor, the best second one is a least-squares fit to the outputs.
            second = _fit(self.weight.flatten(1), self.gram, spread).reshape(outputs, rank, width)
        product = second.reshape(outputs, -1) @ spread
        return [first.unsqueeze(3), second.unsqueeze(2)], product

    def _tucker(self, rank_in: int, rank_out: int) -> tuple[list[Tensor], Tensor]:
        tensor = self.weight.flatten(2)
        outputs, inputs, size = tensor.shape
        left, right = iterate_orthogonal(tensor, rank_in, rank_out)
        core = torch.einsum("oik,ir,os->srk", tensor, right, left)
        spread = torch.einsum("ir,jk->rjik", right, torch.eye(size, dtype=tensor.dtype)).reshape(rank_in * size, -1)
        if self.gram is not None:
            # Given the first factor, the best others are a least-squares fit of limited rank to the outputs.
            fit = _fit(tensor.flatten(1), self.gram, spread)
            root, _ = _root(spread @ self.gram @ spread.T)
            left = torch.linalg.svd(fit @ root, full_matrices=False)[0][:, :rank_out]
            core = (left.T @ fit).reshape(-1, rank_in, size)
        product = left @ core.flatten(1) @ spread
        kernel = self.weight.shape[2:]
        ones = [1] * len(kernel)
        first = right.T.reshape(rank_in, inputs, *ones)
        return [first, core.reshape(-1, rank_in, *kernel), left.reshape(outputs, -1, *ones)], product


def iterate_orthogonal(tensor: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases (outputs, rank_out), (inputs, rank_in) of a tensor (outputs, inputs, kernel): HOOI."""

    def basis(matrix: Tensor, rank: int) -> Tensor:
        return _eigen(matrix)[1][:, :rank]

    right = basis(tensor.transpose(0, 1).flatten(1), rank_in)
    for _ in range(NUM_SWEEPS):
        left = basis(torch.einsum("oik,ir->ork", tensor, right).flatten(1), rank_out)
        right = basis(torch.einsum("oik,os->isk", tensor, left).flatten(1), rank_in)
    return left, right


def damp(gram: Tensor) -> Tensor:
    """Return a Gram matrix that can be inverted: inputs that the examples do not show count a little."""
    mean = float(gram.diagonal().mean()) or 1.0
    return gram + DAMPING * mean * torch.eye(len(gram), dtype=gram.dtype)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of a matrix, largest first, and all its left singular vectors.

    From M M^T in double precision: several times cheaper than an SVD, and singular values below 1e-8 of the largest,
    which it loses, are below the precision of float32 weights.
    """
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    most = min(matrix.shape)
    return values.flip(0)[:most].clamp_min(0.0), vectors.flip(1)


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V^T of the thin singular value decomposition."""
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _thin_svd(matrix.T)
        return right.T, values, left.T
    squares, vectors = _eigen(matrix)
    values = squares.sqrt()
    floor = max(1e-9 * float(values[0]), 1e-300)
    return vectors, values, (vectors.T @ matrix) / values.clamp_min(floor)[:, None]


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-12 * float(values[-1])).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _fit(weight: Tensor, gram: Tensor, spread: Tensor) -> Tensor:
    """Return the B that minimizes ||(weight - B spread) X||."""
    left = spread @ gram
    solution: Tensor = torch.linalg.lstsq(left @ spread.T, left @ weight.T, driver="gelsd").solution
    return solution.T


def _scale_channels(tensor: Tensor, gram: Tensor | None) -> Tensor:
    """Return the unfolding by input channels, weighted by how the channels vary together, neighbours aside."""
    if gram is None:
        return tensor.transpose(0, 1).flatten(1)
    _, inputs, size = tensor.shape
    blocks = gram.reshape(inputs, size, inputs, size).diagonal(dim1=1, dim2=3).mean(-1)
    return torch.einsum("oik,ij->jok", tensor, _root(blocks)[0]).flatten(1)


def _unfold_spatial(weight: Tensor) -> Tensor:
    outputs, inputs, height, width = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)


def _tail_shares(spectrum: Tensor) -> np.ndarray:
    """Return, for every rank from 0, the share of a spectrum's sum that lies beyond it."""
    values = spectrum.numpy()
    tails = np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
    return tails / tails[0] if tails[0] else tails
