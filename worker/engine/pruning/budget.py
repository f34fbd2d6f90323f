"""Removing as much as brings a counted or measured quantity down by a given share."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.recipes.recipe import RUNTIME_FORMATS, Target
from worker.engine.errors import StepFailed
from worker.engine.measure.latency import estimate_ratio
from worker.engine.measure.runtimes import SUFFIXES, Predict, measured_on, open_model, time_models
from worker.engine.programs.export import export
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import ChannelGroup
from worker.engine.pruning.ranking import Chosen, Scores
from worker.engine.pruning.shapes import allowed_batch

LARGEST_RATIO = 0.98
NUM_RATIOS = 99
NUM_TIMED_PROBES = 6
TIMED_RUNS = (10, 60)
"""Calls of each model per probe, at least and at most."""
TIMED_SECONDS = 3.0
"""The calls of a probe take about this long, within TIMED_RUNS."""


@dataclass(frozen=True)
class Found:
    """What to remove, and which share of the quantity remains."""

    chosen: Chosen
    remaining: float
    num_probes: int


def measure_saving(group: ChannelGroup, count: Callable[[Chosen], float]) -> float:
    """Return what removing a unit of the group takes off a counted quantity, as the mean over half of its units."""
    half = np.arange(max(group.num_units // 2, 1))
    return max((count({}) - count({group.name: half})) / len(half), 1e-12)


def make_ladder(choose: Callable[[float], Chosen], scores: dict[str, Scores]) -> list[Chosen]:
    """Return ever larger removals, the first empty; from one to the next a single group loses units.

    `choose` returns what goes at a share of channels. Rounding makes several groups lose units at the same share; then
    the one whose units matter least, against the mean of its group, goes first.
    """
    ladder: list[Chosen] = [{}]
    for ratio in np.linspace(0, LARGEST_RATIO, NUM_RATIOS).tolist():
        last, wanted = ladder[-1], choose(ratio)
        importance = {}
        for name, units in wanted.items():
            if len(units) > len(last.get(name, ())):
                added = np.setdiff1d(units, last.get(name, np.empty(0, dtype=np.int64)))
                importance[name] = float(scores[name][added].mean() / max(scores[name].mean(), 1e-30))
        for name in sorted(importance, key=lambda each: (importance[each], each)):
            ladder.append({**ladder[-1], name: wanted[name]})
    return ladder


def search_count(remaining: float, ladder: list[Chosen], count: Callable[[Chosen], float]) -> Found:
    """Return the smallest removal that leaves at most the share `remaining` of a counted quantity, by bisection."""
    low, high = -1, len(ladder) - 1
    reached, probes = count(ladder[high]), 1
    if reached > remaining:
        raise StepFailed(
            f"removing as much as rounding and the layers allow leaves {reached:.1%}; {remaining:.1%} was asked for",
            code="target_unreachable",
            fix="Lower ratio or round_to, or let more structures go.",
        )
    while high - low > 1:
        middle = (low + high) // 2
        probes += 1
        if (found := count(ladder[middle])) <= remaining:
            high, reached = middle, found
        else:
            low = middle
    return Found(ladder[high], reached, probes)


def search_latency(
    remaining: float,
    ladder: list[Chosen],
    measure: Callable[[Chosen], float],
    report: Callable[[float, str], None] = lambda *_: None,
) -> Found:
    """Return the smallest removal measured to leave at most the share `remaining` of the latency; else the fastest.

    Times are noisy, so the probes are few and bisect the ladder as if latency fell along it.
    """
    low, high = 0, len(ladder)
    probed: list[tuple[int, float]] = []
    while high - low > 1 and len(probed) < NUM_TIMED_PROBES:
        middle = (low + high) // 2
        found = measure(ladder[middle])
        probed.append((middle, found))
        report(len(probed) / NUM_TIMED_PROBES, f"step {middle} of {len(ladder) - 1}: latency x{found:.2f}")
        low, high = (low, middle) if found <= remaining else (middle, high)
    if not probed:
        return Found({}, 1.0, 0)
    enough = [each for each in probed if each[1] <= remaining]
    step, found = min(enough) if enough else min(probed, key=lambda each: each[1])
    return Found(ladder[step], found, len(probed))


class Timer:
    """Times programs against the original in the target's runtime, taking turns call by call."""

    def __init__(self, original: Program, target: Target, directory: Path, seed: int) -> None:
        self._target, self._directory, self._seed = target, directory, seed
        self._inputs = tuple(
            value.numpy() for value in original.example_inputs(allowed_batch(original, target.batch_size))
        )
        self._original = self._open(original, "original")

    def measure(self, program: Program) -> float:
        """Return the program's median latency as a share of the original's."""
        predict = self._open(program, "smaller")
        started_at = time.perf_counter()
        for each in (self._original, predict):
            each(self._inputs)
        seconds = time.perf_counter() - started_at
        num_runs = int(np.clip(TIMED_SECONDS / seconds, TIMED_RUNS[0], min(TIMED_RUNS[1], self._target.num_runs)))
        timings = time_models(self._original, predict, self._inputs, num_runs)
        return estimate_ratio(timings, self._seed).value

    def _open(self, program: Program, name: str) -> Predict:
        runtime = self._target.runtime
        path = self._directory / f"{name}{SUFFIXES[runtime]}"
        export(program, program, RUNTIME_FORMATS[runtime], path, self._target)
        return open_model(path, runtime, program.signature, self._target.num_threads, measured_on(self._target))
