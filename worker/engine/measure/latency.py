"""Time of one call of two models, interleaved, and the ratio of their medians with its confidence interval."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.recipes.metrics import Latency, Ratio

Call = Callable[[], object]
Clock = Callable[[Call], float]
"""Makes a call and returns the seconds it took."""
Seconds = NDArray[np.float64]

WARM_UP_WINDOW = 5
"""Calls whose median must agree with that of the calls before them."""
WARM_UP_TOLERANCE = 0.1
WARM_UP_SECONDS = (0.1, 3.0)
"""Per model, at least and at most; a model that is still not stable then is measured as it is."""
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
CHUNK_VALUES = 2_000_000
"""Numbers resampled at a time, which bounds the memory of the bootstrap."""


@dataclass(frozen=True)
class Timings:
    """Seconds of each call, shape (blocks, calls per block). Row i of both was measured in the same moment."""

    original: Seconds
    result: Seconds


def time_on_cpu(call: Call) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9


def time_on_cuda(call: Call) -> float:
    """Return the time between two events on the device's stream, one before and one behind what the call puts there.

    The stream is empty before, so the time to launch the work counts where the device would wait for it.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def time_interleaved(
    original: Call,
    result: Call,
    num_runs: int,
    report: Callable[[float], None] = lambda _: None,
    clock: Clock = time_on_cpu,
) -> Timings:
    """Time `num_runs` calls of each model (rounded up to even) in blocks of original, result, result, original.

    Neighbours share whatever the machine is doing at that moment, and the mirrored order cancels a steady drift.
    Before, each runs until its time is stable: that loads kernels, and brings the device's clocks up.
    """
    _warm_up(original, clock)
    _warm_up(result, clock)
    num_blocks = (num_runs + 1) // 2
    timings = Timings(np.empty((num_blocks, 2)), np.empty((num_blocks, 2)))
    told_at = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for block in range(num_blocks):
            timings.original[block, 0] = clock(original)
            timings.result[block, 0] = clock(result)
            timings.result[block, 1] = clock(result)
            timings.original[block, 1] = clock(original)
            if time.perf_counter() - told_at > 0.5:
                report((block + 1) / num_blocks)
                told_at = time.perf_counter()
    finally:
        if collecting:
            gc.enable()
    return timings


def summarize(seconds: Seconds, *, batch_size: int, num_threads: int) -> Latency:
    """Return the percentiles of the calls, in milliseconds."""
    milliseconds = seconds.ravel() * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(milliseconds, (50, 90, 99)))
    return Latency(
        batch_size=batch_size,
        num_threads=num_threads,
        num_runs=milliseconds.size,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(milliseconds.mean()),
    )


def estimate_ratio(timings: Timings, seed: int) -> Ratio:
    """Return median(result) / median(original) with a paired-block bootstrap interval.

    Blocks are drawn with replacement and both models' calls of a drawn block are taken together.
    """
    num_blocks = len(timings.original)
    random = np.random.default_rng(seed)
    chunk = max(1, CHUNK_VALUES // timings.original.size)
    ratios = []
    for start in range(0, NUM_RESAMPLES, chunk):
        drawn = random.integers(num_blocks, size=(min(chunk, NUM_RESAMPLES - start), num_blocks))
        ratios.append(_medians(timings.result[drawn]) / _medians(timings.original[drawn]))
    low, high = np.quantile(np.concatenate(ratios), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    value = float(np.median(timings.result) / np.median(timings.original))
    return Ratio(value=value, low=min(float(low), value), high=max(float(high), value))


def _medians(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    medians: NDArray[np.float64] = np.median(drawn.reshape(len(drawn), -1), axis=1)
    return medians


def _warm_up(call: Call, clock: Clock) -> None:
    shortest, longest = WARM_UP_SECONDS
    started_at = time.perf_counter()
    before = clock(call)
    while (elapsed := time.perf_counter() - started_at) < longest:
        now = float(np.median([clock(call) for _ in range(WARM_UP_WINDOW)]))
        if elapsed >= shortest and abs(now - before) <= WARM_UP_TOLERANCE * before:
            return
        before = now
