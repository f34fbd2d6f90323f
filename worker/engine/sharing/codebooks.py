"""A weight as a codebook, by k-means over its values, with a cluster of its own for exact zeros."""

import numpy as np
import torch
from torch import Tensor

from worker.engine.packing.encodings import Codebook
from worker.engine.programs.program import Program
from worker.engine.sharing.clusters import Initialization, assign, find_clusters


def share(
    weight: Tensor, num_clusters: int, rows_per_codebook: int | None, initialization: Initialization, iterations: int
) -> Codebook:
    """Return the codebook of a weight (rows, ...). Where there are zeros, index 0 is exactly zero and holds them alone.

    Zeros are pruned weights, or the row of an embedding's padding. `rows_per_codebook` None: one codebook.
    """
    matrix = weight.detach().cpu().double().reshape(weight.shape[0], -1).numpy()
    size = min(rows_per_codebook or len(matrix), len(matrix))
    blocks = [matrix[start : start + size] for start in range(0, len(matrix), size)]
    reserved = 1 if (matrix == 0).any() else 0
    indices = np.zeros(matrix.shape, np.uint8)
    found = []
    for number, block in enumerate(blocks):
        filled = block != 0 if reserved else np.ones(block.shape, bool)
        centroids = np.zeros(0)
        if filled.any():
            clusters = find_clusters(block[filled], num_clusters - reserved, initialization, iterations)
            centroids = clusters.centroids
            indices[number * size : number * size + len(block)][filled] = assign(block[filled], centroids) + reserved
        found.append(np.concatenate([np.zeros(reserved), centroids]))
    # Blocks with fewer different values repeat their last centroid, to which no index points.
    longest = max(len(each) for each in found)
    table = np.stack([np.pad(each, (0, longest - len(each)), mode="edge") for each in found])
    return Codebook(torch.from_numpy(indices).reshape(weight.shape), torch.from_numpy(table).float(), size)


class SharedWeights:
    """Holds while centroids are trained: the weights of a cluster move together, zeros stay zero.

    Its tensors are where the parameters are when it is made.

    Han et al. (2015) add the gradients of a cluster up. Here each weight gets their mean, which is the part of the
    gradient that keeps a cluster together; so a learning rate that suits the weights suits the centroids.
    """

    def __init__(self, program: Program, codebooks: dict[str, Codebook]) -> None:
        parameters = dict(program.module.named_parameters(remove_duplicate=False))
        self._clusters = {name: _Clusters(parameters[name], codebook) for name, codebook in codebooks.items()}
        others = [name for name in program.encodings if name not in codebooks]
        self._frozen = [(parameters[name], parameters[name].detach().clone()) for name in others]

    def limit_gradients(self) -> None:
        """Give each weight the mean gradient of its cluster."""
        for each in self._clusters.values():
            each.limit_gradients()
        for parameter, _ in self._frozen:
            parameter.grad = None

    def restore(self) -> None:
        """Give each weight the value of its cluster's first, and weights coded by earlier steps what they had."""
        for each in self._clusters.values():
            each.restore()
        for parameter, values in self._frozen:
            parameter.copy_(values)

    def encode(self, program: Program) -> None:
        """Put the trained centroids into the program's encodings."""
        for name, each in self._clusters.items():
            program.encode(name, each.to_codebook())


class _Clusters:
    def __init__(self, parameter: torch.nn.Parameter, codebook: Codebook) -> None:
        self._parameter, self._codebook = parameter, codebook
        num_codebooks, size = codebook.centroids.shape
        device = parameter.device
        rows = torch.arange(parameter.shape[0], device=device) // codebook.rows_per_codebook
        indices = codebook.indices.to(device).reshape(parameter.shape[0], -1).long()
        cluster = (indices + rows[:, None] * size).reshape(-1)
        self._cluster = cluster
        self._counts = torch.bincount(cluster, minlength=num_codebooks * size).clamp(min=1)
        self._used = torch.bincount(cluster, minlength=num_codebooks * size) > 0
        self._old = codebook.centroids.to(device).reshape(-1)
        self._zero = self._old == 0
        first = torch.full((num_codebooks * size,), cluster.numel() - 1, device=device)
        self._first = first.scatter_reduce(0, cluster, torch.arange(cluster.numel(), device=device), "amin")

    def limit_gradients(self) -> None:
        if self._parameter.grad is None:
            return
        gradient = self._parameter.grad.reshape(-1)
        sums = torch.bincount(self._cluster, gradient.double(), minlength=len(self._counts))
        means = (sums / self._counts).masked_fill(self._zero, 0.0).to(gradient.dtype)
        self._parameter.grad.copy_(means[self._cluster].view_as(self._parameter))

    def restore(self) -> None:
        self._parameter.copy_(self._centroids()[self._cluster].view_as(self._parameter))

    def to_codebook(self) -> Codebook:
        centroids = torch.where(self._used, self._centroids(), self._old)
        shape = self._codebook.centroids.shape
        return Codebook(self._codebook.indices, centroids.reshape(shape), self._codebook.rows_per_codebook)

    def _centroids(self) -> Tensor:
        return self._parameter.detach().reshape(-1)[self._first].masked_fill(self._zero, 0.0)
