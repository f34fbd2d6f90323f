"""Feeding training examples to ONNX Runtime's quantizer, and what this processor can add up exactly."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples

CALIBRATION_BATCH = 16


def has_exact_integer_products() -> bool:
    """Return whether this processor sums 8-bit products without saturating (x86 needs VNNI for it)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "flags" not in flags or "vnni" in flags


class CalibrationReader(CalibrationDataReader):  # type: ignore[misc]
    """Training examples in the form the quantizer asks for, one batch at a time."""

    def __init__(
        self, examples: BoundExamples, program: Program, num_examples: int, seed: int, report: Callable[..., None]
    ) -> None:
        size = min(CALIBRATION_BATCH, num_examples)
        self._batches = examples.training_batches(size, seed=seed, drop_last=examples.num_training >= size)
        self._names = [tensor.name for tensor in program.signature.inputs]
        available = examples.num_training_batches(size, drop_last=examples.num_training >= size)
        wanted = -(-num_examples // (examples.fixed_batch or size))
        self._num_batches = min(available, wanted)
        self._report = report
        self._left_in_range = 0
        self._done = 0

    def __len__(self) -> int:
        return self._num_batches

    def set_range(self, start_index: int, end_index: int) -> None:
        """Allow the next batches up to `end_index`."""
        self._left_in_range = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None at the end of the range."""
        if not self._left_in_range:
            return None
        self._left_in_range -= 1
        self._done += 1
        self._report(
            0.2 + 0.5 * self._done / self._num_batches, f"calibration batch {self._done} of {self._num_batches}"
        )
        inputs, _ = next(self._batches)
        return {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
