"""One-dimensional k-means: Lloyd's iterations over sorted values, where a cluster is an interval.

With prefix sums an iteration takes clusters * log(values) operations, whatever the number of values. Everything is
deterministic and in float64. The squared error never rises from one iteration to the next, and never from k to 2 k
clusters: one of the two starts of 2 k clusters is the result for k with k more centroids.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Initialization = Literal["linear", "density", "quantile"]
Values = NDArray[np.float64]
DENSITY_BINS = 256


@dataclass(frozen=True)
class Clusters:
    """What k-means found: ascending centroids, none of them empty."""

    centroids: Values
    squared_error: float
    """Sum over all values."""


def find_clusters(
    values: Values, num_clusters: int, initialization: Initialization = "linear", max_iterations: int = 100
) -> Clusters:
    """Return at most `num_clusters` centroids of the values, of which there is at least one.

    Where there are no more different values than clusters, the centroids are the values and the error is zero.
    """
    ordered = np.sort(values.astype(np.float64), axis=None)
    different = ordered[np.concatenate([[True], np.diff(ordered) > 0])]
    if len(different) <= num_clusters:
        return Clusters(different, 0.0)
    return _Sorted(ordered, initialization, max_iterations).find(num_clusters)


def assign(values: Values, centroids: Values) -> NDArray[np.intp]:
    """Return the index of the nearest of ascending centroids; halfway between two, the lower."""
    return np.searchsorted((centroids[:-1] + centroids[1:]) / 2, values, side="left")


class _Sorted:
    def __init__(self, ordered: Values, initialization: Initialization, max_iterations: int) -> None:
        self._ordered, self._initialization, self._max_iterations = ordered, initialization, max_iterations
        # Around their mean, so that sums of squares lose no digits.
        self._mean = float(ordered.mean())
        centered = ordered - self._mean
        self._sums = np.concatenate([[0.0], np.cumsum(centered)])
        self._squares = np.concatenate([[0.0], np.cumsum(centered**2)])

    def find(self, num_clusters: int) -> Clusters:
        starts = [self._begin(num_clusters)]
        if num_clusters > 1:
            starts.append(self.find(num_clusters // 2).centroids)
        found = [self._iterate(start, num_clusters) for start in starts]
        return min(found, key=lambda each: each.squared_error)

    def _begin(self, num_clusters: int) -> Values:
        ordered = self._ordered
        shares = (np.arange(num_clusters) + 0.5) / num_clusters
        if self._initialization == "linear":
            return np.linspace(ordered[0], ordered[-1], num_clusters)
        if self._initialization == "quantile":
            return np.unique(np.quantile(ordered, shares))
        # Evenly over the values of the cumulative distribution, as Han et al. draw it: its inverse at even shares of a
        # smoothed histogram, so that a value that occurs very often does not take all the centroids.
        counts, edges = np.histogram(ordered, DENSITY_BINS)
        reached = np.concatenate([[0.0], np.cumsum(np.sqrt(counts))])
        centroids: Values = np.interp(shares * reached[-1], reached, edges)
        return centroids

    def _iterate(self, start: Values, num_clusters: int) -> Clusters:
        centroids, bounds = np.unique(start), None
        for _ in range(self._max_iterations):
            centroids = self._fill(centroids, num_clusters)
            new_bounds = self._cut(centroids)
            if bounds is not None and np.array_equal(bounds, new_bounds):
                break
            bounds = new_bounds
            centroids = self._average(bounds)
        # The last centroids may attract other values than those they are the mean of.
        final = self._cut(self._fill(centroids, num_clusters))
        centroids = self._average(final)
        return Clusters(centroids, self._error(final))

    def _fill(self, centroids: Values, num_clusters: int) -> Values:
        """Return as many centroids as asked for, each with values of its own: new ones at the values farthest away.

        They are fewer where values are so close that the middle between two is one of them.
        """
        for _ in range(4 * num_clusters):
            bounds = self._cut(centroids)
            filled = np.diff(bounds) > 0
            if not filled.all():
                centroids = centroids[filled]
                continue
            if len(centroids) == num_clusters:
                break
            ends = np.stack([self._ordered[bounds[:-1]], self._ordered[bounds[1:] - 1]])
            side, cluster = np.unravel_index(int(np.abs(ends - centroids).argmax()), ends.shape)
            centroids = np.unique(np.append(centroids, ends[side, cluster]))
        while not (filled := np.diff(self._cut(centroids)) > 0).all():
            centroids = centroids[filled]
        return centroids

    def _cut(self, centroids: Values) -> NDArray[np.intp]:
        """Return where each cluster begins among the ordered values, and the end of the last."""
        middles = (centroids[:-1] + centroids[1:]) / 2
        return np.concatenate([[0], np.searchsorted(self._ordered, middles, side="right"), [len(self._ordered)]])

    def _average(self, bounds: NDArray[np.intp]) -> Values:
        return np.diff(self._sums[bounds]) / np.diff(bounds) + self._mean

    def _error(self, bounds: NDArray[np.intp]) -> float:
        within = np.diff(self._squares[bounds]) - np.diff(self._sums[bounds]) ** 2 / np.diff(bounds)
        return float(np.maximum(within, 0.0).sum())
