"""Interleaved timing, and the bootstrap interval of the ratio of medians."""

import gc
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.measure.latency import Timings, estimate_ratio, summarize, time_interleaved
from worker.engine.measure.verdict import is_clear


def draw(seed: int, num_blocks: int, ratio: float, spread: float) -> Timings:
    random = np.random.default_rng(seed)
    drift = random.lognormal(0, 0.3, size=(num_blocks, 1))
    return Timings(
        drift * random.lognormal(0, spread, (num_blocks, 2)),
        ratio * drift * random.lognormal(0, spread, (num_blocks, 2)),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 60), st.floats(0.1, 10), st.floats(0.001, 0.5))
def test_the_interval_holds_the_estimate_and_is_the_same_for_the_same_seed(
    seed: int, num_blocks: int, ratio: float, spread: float
) -> None:
    timings = draw(seed, num_blocks, ratio, spread)
    estimate = estimate_ratio(timings, seed)
    assert 0 < estimate.low <= estimate.value <= estimate.high
    assert estimate == estimate_ratio(timings, seed)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_the_ratio_does_not_depend_on_the_unit_of_time(seed: int, unit: float) -> None:
    timings = draw(seed, 20, 0.7, 0.1)
    scaled = Timings(timings.original * unit, timings.result * unit)
    assert estimate_ratio(scaled, 1).value == pytest.approx(estimate_ratio(timings, 1).value)
    assert estimate_ratio(scaled, 1).low == pytest.approx(estimate_ratio(timings, 1).low)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    estimates = [estimate_ratio(draw(seed, 50, 0.8, 0.1), seed) for seed in range(200)]
    covered = sum(each.low <= 0.8 <= each.high for each in estimates)
    assert covered >= 180  # 95 % of 200 is 190; the drift makes blocks alike, so the interval errs on the wide side


def test_equal_speed_is_seldom_called_a_change_and_a_real_one_always() -> None:
    same = sum(is_clear(estimate_ratio(draw(seed, 50, 1.0, 0.1), seed)) for seed in range(100))
    faster = sum(is_clear(estimate_ratio(draw(seed, 50, 0.5, 0.1), seed)) for seed in range(100))
    assert same <= 8
    assert faster == 100


def test_many_runs_are_resampled_in_bounded_pieces() -> None:
    timings = Timings(np.full((5000, 2), 2.0), np.full((5000, 2), 1.0))
    assert estimate_ratio(timings, 0).model_dump() == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_models_take_turns_in_mirrored_order_without_garbage_collection() -> None:
    calls: list[str] = []
    collecting: set[bool] = set()

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        collecting.add(gc.isenabled())
        time.sleep(seconds)

    timings = time_interleaved(lambda: call("a", 0.004), lambda: call("b", 0.001), num_runs=11)
    assert "".join(calls[-24:]) == "abba" * 6
    assert gc.isenabled()
    assert False in collecting
    assert timings.original.shape == timings.result.shape == (6, 2)
    assert float(np.median(timings.original)) > float(np.median(timings.result))


def test_percentiles_are_of_all_calls_in_milliseconds() -> None:
    latency = summarize(np.arange(1, 101).reshape(50, 2) / 1000, batch_size=4, num_threads=2)
    assert latency.num_runs == 100
    assert latency.p50_ms == latency.mean_ms == pytest.approx(50.5)
    assert latency.p90_ms == pytest.approx(90.1)
    assert latency.p99_ms == pytest.approx(99.01)
