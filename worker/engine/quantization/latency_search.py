"""The best assignment of precisions that is measured to be fast enough, through the real export and runtime."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.recipes.metrics import Ratio
from app.recipes.recipe import Target
from worker.engine.measure.inputs import choose_batch, choose_inputs
from worker.engine.measure.latency import estimate_ratio, time_interleaved
from worker.engine.measure.macs import count_macs
from worker.engine.measure.runtimes import Predict, open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import Program
from worker.engine.quantization.allocation import Option, allocate
from worker.engine.quantization.mixed import Assignment, MixedSearch, Report
from worker.engine.training.examples import BoundExamples

NUM_RUNS = 40
"""Timed calls per assignment, at most; the job's final measurement has as many as its target asks for."""
NUM_REFINEMENTS = 4
UNITS = 1_000_000
"""The estimated time of the unchanged model."""


@dataclass(frozen=True)
class Timed:
    """An assignment and its measured time over that of the unchanged model."""

    assignment: Assignment
    ratio: Ratio


@dataclass
class LatencyOf:
    """Exports assignments and times them against the unchanged model, call by call."""

    program: Program
    """Unchanged; it is copied for each export."""
    search: MixedSearch
    target: Target
    examples: BoundExamples
    directory: Path
    seed: int
    timed: list[Timed] = field(default_factory=list)

    def __post_init__(self) -> None:
        batch_size, _ = choose_batch(self.program.signature, self.target)
        self._inputs = choose_inputs(self.program, self.examples, batch_size, self.seed)[0]
        self._original = self._open(self.program, "unchanged")

    def measure(self, assignment: Assignment) -> Timed:
        """Return the measured ratio."""
        candidate = self.program.copy()
        for row, column in enumerate(assignment):
            for name, encoding in self.search.choices[row][column].encodings.items():
                candidate.encode(name, encoding)
        result = self._open(candidate, f"candidate_{len(self.timed)}")
        timings = time_interleaved(
            lambda: self._original(self._inputs), lambda: result(self._inputs), min(NUM_RUNS, self.target.num_runs)
        )
        timed = Timed(assignment, estimate_ratio(timings, self.seed))
        self.timed.append(timed)
        return timed

    def _open(self, program: Program, stem: str) -> Predict:
        path = self.directory / f"{stem}.onnx"
        export_onnx(program, path)
        predict = open_model(path, "onnxruntime", program.signature, self.target.num_threads)
        path.unlink()
        return predict


def find_fast(search: MixedSearch, latency: LatencyOf, max_ratio: float, report: Report) -> tuple[Timed | None, bool]:
    """Return the assignment with the smallest summed effect within the limit, and whether it is within.

    First every precision is timed on all layers that compute. What is faster beyond noise is then mixed: a layer's
    share of the time is taken to be its share of the MACs, the mix is timed, and the limit of the estimate is tightened
    or loosened by what was measured. Where nothing within the limit was found, the fastest is returned; where
    nothing is faster at all, None.
    """
    macs = count_macs(latency.program).by_layer
    work = [sum(macs.get(name, 0) for name in layer.names) for layer in search.layers]
    total = max(sum(work), 1)
    computing = [row for row, each in enumerate(work) if each]
    num_choices = len(search.choices[0])
    speed: dict[int, float] = {}
    for column in range(num_choices):
        if not search.choices[0][column].encodings:
            continue
        timed = latency.measure(tuple(column if row in computing else 0 for row in range(len(work))))
        report(0.6 * (column + 1) / num_choices, f"{search.choices[0][column].precision}: x{timed.ratio.value:.2f}")
        if timed.ratio.high < 1:
            speed[column] = timed.ratio.value
    if not speed:
        return None, False
    options = [
        [
            Option(round(UNITS * work[row] / total * speed.get(column, 1.0)), effect)
            for column, effect in enumerate(effects)
            if column in speed or column == 0
        ]
        for row, effects in enumerate(search.effects)
    ]
    columns = [0, *sorted(speed)] if 0 not in speed else sorted(speed)
    limit = max_ratio
    for number in range(NUM_REFINEMENTS):
        found = allocate(options, round(UNITS * limit))
        if found is None:
            break
        assignment = tuple(columns[index] for index in found)
        if any(each.assignment == assignment for each in latency.timed):
            break
        timed = latency.measure(assignment)
        report(0.6 + 0.4 * (number + 1) / NUM_REFINEMENTS, f"mixed: x{timed.ratio.value:.2f}")
        # Part of the time is spent outside the layers, so an estimate errs in proportion to what it saves.
        limit += max_ratio - timed.ratio.value
    return _choose(search, latency.timed, max_ratio)


def _choose(search: MixedSearch, timed: Sequence[Timed], max_ratio: float) -> tuple[Timed, bool]:
    within = [each for each in timed if each.ratio.value <= max_ratio]
    if within:
        return min(within, key=lambda each: search.error(each.assignment)), True
    return min(timed, key=lambda each: each.ratio.value), False
