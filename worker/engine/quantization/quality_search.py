"""The smallest assignment of precisions whose measured quality is still good enough."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from app.recipes.metrics import Quality
from worker.engine.programs.program import Program
from worker.engine.quantization.allocation import allocate, cost_of
from worker.engine.quantization.mixed import Assignment, MixedSearch, Report
from worker.engine.training.examples import BoundExamples
from worker.engine.training.quality import PairedQuality, Predict, evaluate_pair, predict_with

NUM_BISECTIONS = 8
BATCH = 64
MAX_OUTPUT_BYTES = 2**29
"""Of the original's outputs, kept so that it need not run again for each comparison."""


@dataclass(frozen=True)
class Found:
    """An assignment with its measured quality."""

    assignment: Assignment
    quality: PairedQuality
    loss: float
    """How much worse than the unchanged model, in the unit of the metric."""


class QualityOf:
    """Measures assignments on the rows set apart for choosing, always against the unchanged model."""

    def __init__(self, program: Program, examples: BoundExamples) -> None:
        """The program must still carry its own weights."""
        self._module, self._examples = program.module, examples
        self._original = _Original(program, examples)
        self.num_measured = 0

    def measure(self) -> PairedQuality:
        """Return the quality of the unchanged model and of the module as it is now."""
        self.num_measured += 1
        return evaluate_pair(self._original(), predict_with(self._module), self._examples, batch_size=BATCH)


def find_smallest(search: MixedSearch, quality: QualityOf, max_loss: float, report: Report) -> tuple[Found, Found]:
    """Return the smallest assignment found whose loss is at most `max_loss`, and the finest one there is.

    The size is bisected; at each size the optimum of the summed effects is measured. At the size found, the error of
    the whole is lowered as far as the quality stays within the limit. Where even the finest loses more,
    both are that one.
    """
    options = search.options()
    known: dict[Assignment, Found] = {}

    def measure(assignment: Assignment) -> Found:
        if assignment not in known:
            search.set(assignment)
            pair = quality.measure()
            known[assignment] = Found(assignment, pair, _loss(pair.baseline, pair.result))
        return known[assignment]

    finest = measure((0,) * len(options))
    if finest.loss > max_loss:
        return finest, finest
    low = sum(min(option.cost for option in each) for each in options)
    best, high = finest, cost_of(options, finest.assignment)
    middle = low
    for number in range(NUM_BISECTIONS):
        assignment = allocate(options, middle)
        assert assignment is not None
        found = measure(assignment)
        report((number + 1) / NUM_BISECTIONS, f"{cost_of(options, assignment)} bytes lose {found.loss:.4g}")
        if found.loss <= max_loss:
            best, high = found, cost_of(options, assignment)
        else:
            low = middle
        if high <= low:
            break
        middle = (low + high) // 2
    better = search.choose(cost_of(options, best.assignment), lambda *_: None)
    if better is not None and measure(better).loss <= max_loss:
        best = known[better]
    return best, finest


def _loss(before: Quality, after: Quality) -> float:
    return before.value - after.value if before.higher_is_better else after.value - before.value


class _Original:
    """The unchanged model: remembered outputs where they are small enough, else a copy that runs again."""

    def __init__(self, program: Program, examples: BoundExamples) -> None:
        self._remembered: list[tuple[np.ndarray, ...]] = []
        self._copy: nn.Module | None = None
        predict = predict_with(program.module)
        size = 0
        with torch.inference_mode():
            for inputs, _, _ in examples.padded_batches(BATCH):
                outputs = predict(tuple(tensor.numpy() for tensor in inputs))
                size += sum(each.nbytes for each in outputs)
                if size > MAX_OUTPUT_BYTES:
                    self._copy = program.copy().module.eval()
                    self._remembered.clear()
                    return
                self._remembered.append(outputs)

    def __call__(self) -> Predict:
        """Return a function of the batches in their fixed order."""
        if self._copy is not None:
            return predict_with(self._copy)
        outputs = iter(self._remembered)
        return lambda _: next(outputs)
