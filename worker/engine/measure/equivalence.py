"""How close the outputs of two models are on the same inputs."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.recipes.metrics import Equivalence
from worker.engine.errors import StepFailed
from worker.engine.measure.padding import clear_padding

LOWEST_SNR_DB = -300.0
"""Said where the original's output is zero and the result's is not."""


class OutputComparison:
    """Collects one output over batches. Axis 0 counts the examples."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._signal = 0.0
        self._error = 0.0
        self._largest = 0.0
        self._cosines = 0.0
        self._num_examples = 0

    def add(
        self,
        original: NDArray[np.generic],
        result: NDArray[np.generic],
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Compare one batch. `mask` (batch, positions) is False at padding, where values mean nothing."""
        if original.shape != result.shape:
            raise StepFailed(
                f"output {self.output!r} has the shape {list(result.shape)}, the original's is {list(original.shape)}"
            )
        original, result = clear_padding(original, mask), clear_padding(result, mask)
        num_examples = original.shape[0] if original.ndim else 1
        expected = original.astype(np.float64).reshape(num_examples, -1)
        actual = result.astype(np.float64).reshape(num_examples, -1)
        broken = np.isfinite(expected) & ~np.isfinite(actual)
        if broken.any():
            raise StepFailed(
                f"{int(broken.sum())} of {broken.size} numbers of output {self.output!r} are not finite "
                "where the original's are",
                code="outputs_not_finite",
                fix="Use a smaller learning rate or a milder compression.",
            )
        # What is infinite or undefined in the original carries no number to compare (masked logits, for example).
        expected, actual = (np.where(np.isfinite(expected), each, 0.0) for each in (expected, actual))
        actual = np.nan_to_num(actual, nan=0.0, posinf=0.0, neginf=0.0)
        error = actual - expected
        self._signal += float(np.square(expected).sum())
        self._error += float(np.square(error).sum())
        self._largest = max(self._largest, float(np.abs(error).max(initial=0.0)))
        self._cosines += float(_cosines(expected, actual).sum())
        self._num_examples += num_examples

    def conclude(self) -> Equivalence:
        """Return the comparison over everything added."""
        return Equivalence(
            output=self.output,
            cosine=self._cosines / self._num_examples,
            snr_db=_decibel(self._signal, self._error),
            max_abs_error=self._largest,
            num_examples=self._num_examples,
        )


def compare_outputs(
    names: Sequence[str],
    batches: Sequence[tuple[tuple[NDArray[np.generic], ...], tuple[NDArray[np.generic], ...]]],
    masks: Sequence[NDArray[np.bool_] | None] | None = None,
) -> tuple[Equivalence, ...]:
    """Compare (original outputs, result outputs) of every batch, output by output; `masks` has one per batch."""
    comparisons = [OutputComparison(name) for name in names]
    for (original, result), mask in zip(batches, masks or [None] * len(batches), strict=True):
        for comparison, expected, actual in zip(comparisons, original, result, strict=True):
            comparison.add(expected, actual, mask)
    return tuple(comparison.conclude() for comparison in comparisons)


def _cosines(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    dot = (expected * actual).sum(axis=1)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    # Two zero vectors agree, a zero vector and another one have nothing in common.
    same = (expected == actual).all(axis=1)
    cosines: NDArray[np.float64] = np.where(
        same, 1.0, np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0)
    )
    return np.clip(cosines, -1.0, 1.0)


def _decibel(signal: float, error: float) -> float | None:
    if error == 0:
        return None
    return max(10 * math.log10(signal / error), LOWEST_SNR_DB) if signal > 0 else LOWEST_SNR_DB
