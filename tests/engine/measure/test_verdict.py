"""The verdict: every claim follows from its test, and nothing bad is left unsaid."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.recipes.metrics import Equivalence, Latency, Measurement, Quality, Ratio, Verdict
from worker.engine.measure.compare import compare
from worker.engine.measure.verdict import judge

MIB = 1024**2


def measurement(
    *,
    p50: float = 10.0,
    file: int = 1_000_000,
    memory: int = 50 * MIB,
    value: float | None = 0.95,
    error: float | None = 0.01,
    metric: Any = "accuracy",
    higher: bool = True,
    parameters: int = 250_000,
    zeros: int = 0,
    macs: int | None = 1_000_000,
    packed: int | None = None,
) -> Measurement:
    quality = (
        None
        if value is None
        else Quality(metric=metric, value=value, higher_is_better=higher, num_examples=400, standard_error=error)
    )
    return Measurement(
        quality=quality,
        latency=Latency(batch_size=1, num_threads=1, num_runs=100, p50_ms=p50, p90_ms=p50, p99_ms=p50, mean_ms=p50),
        throughput_per_second=1e3 / p50,
        peak_memory_bytes=memory,
        file_bytes=file,
        packed_bytes=packed,
        parameters=parameters,
        nonzero_parameters=parameters - zeros,
        macs=macs,
    )


def verdict(
    result: Measurement, *, width: float = 0.02, cosine: float = 1.0, baseline: Measurement | None = None, **more: Any
) -> Verdict:
    original = baseline or measurement()
    value = result.latency.p50_ms / original.latency.p50_ms
    ratio = Ratio(value=value, low=value - width, high=value + width)
    near = Equivalence(output="y", cosine=cosine, snr_db=20.0, max_abs_error=0.1, num_examples=64)
    return judge(original, result, compare(original, result, ratio, [near]), **more)


# (what changed, half width of the interval, outcome, where the sentence is, what it starts with)
CASES = [
    ({}, 0.02, "no_difference", "within_noise", "Latency is the same within noise: p50 10 ms to 10 ms"),
    (
        {"p50": 5.0},
        0.02,
        "better",
        "better",
        "Faster 2.00 times: p50 10 ms to 5 ms at batch 1 on 1 thread, ratio 0.500",
    ),
    ({"p50": 20.0}, 0.02, "worse", "worse", "Slower 2.00 times: p50 10 ms to 20 ms"),
    ({"p50": 5.0}, 0.6, "no_difference", "within_noise", "Latency is the same within noise: p50 10 ms to 5 ms"),
    ({"p50": 9.9}, 0.001, "no_difference", "within_noise", "Latency is the same within noise"),
    ({"file": 400_000}, 0.02, "better", "better", "The file is 60 % smaller: 1 MB to 400 kB.".replace(" %", "%")),
    ({"file": 1_500_000}, 0.02, "worse", "worse", "The file is 50% larger: 1 MB to 1.5 MB."),
    ({"file": 1_001_000}, 0.02, "no_difference", "within_noise", "The file is as large as it was"),
    (
        {"packed": 50_000},
        0.02,
        "better",
        "better",
        "The packed file is 20.0x smaller: 50 kB packed, all included, against 1 MB of the original's file. A gain in "
        "storage: it is decoded when it is loaded, so memory and speed are those of the dense model.",
    ),
    ({"packed": 50_000}, 0.02, "better", "within_noise", "The file is as large as it was"),
    ({"packed": 1_100_000}, 0.02, "worse", "worse", "The packed file is 10% larger: 1.1 MB packed"),
    ({"packed": 50_000, "file": 1_500_000}, 0.02, "mixed", "worse", "The file is 50% larger"),
    ({"packed": 995_000}, 0.02, "no_difference", "within_noise", "The packed file is as large as the original's"),
    ({"memory": 20 * MIB}, 0.02, "better", "better", "Peak memory fell by 60%: 52.4 MB to 21 MB"),
    ({"memory": 90 * MIB}, 0.02, "worse", "worse", "Peak memory rose by 80%"),
    ({"memory": 51 * MIB}, 0.02, "no_difference", "within_noise", "Peak memory is the same within noise"),
    (
        {"value": 0.90},
        0.02,
        "worse",
        "worse",
        "Quality (accuracy) is worse: 0.95 to 0.9 on 400 examples (change -0.0500",
    ),
    (
        {"value": 0.94},
        0.02,
        "no_difference",
        "within_noise",
        "Quality (accuracy) is the same within noise: 0.95 to 0.94",
    ),
    ({"value": 0.99}, 0.02, "better", "better", "Quality (accuracy) is better: 0.95 to 0.99"),
    ({"p50": 5.0, "value": 0.5}, 0.02, "mixed", "worse", "Quality (accuracy) is worse"),
    ({"file": 250_000, "p50": 20.0}, 0.02, "mixed", "worse", "Slower 2.00 times"),
    ({"macs": 400_000}, 0.02, "no_difference", "within_noise", "Latency is the same within noise"),
]


@pytest.mark.parametrize(("changes", "width", "outcome", "side", "start"), CASES)
def test_each_change_is_said_on_its_side(
    changes: dict[str, Any], width: float, outcome: str, side: str, start: str
) -> None:
    said = verdict(measurement(**changes), width=width)
    assert said.outcome == outcome
    assert [sentence for sentence in getattr(said, side) if sentence.startswith(start)], getattr(said, side)


def test_the_summary_names_what_made_the_outcome_worse() -> None:
    assert "80% more peak memory" in verdict(measurement(memory=90 * MIB), width=0.02).summary


def test_fewer_macs_are_told_but_are_no_gain() -> None:
    said = verdict(measurement(macs=400_000))
    assert "MACs fell by 60% to 400,000" in said.within_noise[0]
    assert said.better == ()


def test_zeros_are_never_a_gain() -> None:
    said = verdict(measurement(zeros=200_000))
    assert said.outcome == "no_difference"
    assert said.better == ()
    assert any("200,000 of 250,000 stored numbers are zero (80%)" in warning for warning in said.warnings)


def test_a_lower_error_is_better() -> None:
    before = measurement(metric="mean_squared_error", value=2.0, higher=False)
    after = measurement(metric="mean_squared_error", value=1.0, higher=False)
    assert verdict(after, baseline=before).outcome == "better"
    assert verdict(before, baseline=after).outcome == "worse"


def test_the_error_of_the_paired_difference_decides_where_it_is_known() -> None:
    assert verdict(measurement(value=0.94), quality_change_error=0.002).outcome == "worse"
    assert verdict(measurement(value=0.90), quality_change_error=0.05).outcome == "no_difference"


def test_without_data_far_outputs_are_worse_and_the_report_says_what_was_not_measured() -> None:
    before = measurement(value=None)
    near, far = (verdict(measurement(value=None, p50=5.0), baseline=before, cosine=each) for each in (0.999, 0.3))
    assert (near.outcome, far.outcome) == ("better", "mixed")
    assert any("mean cosine 0.30000" in sentence for sentence in far.worse)
    assert any("no data" in warning for warning in near.warnings)


def test_an_output_that_no_label_speaks_for_is_not_forgotten() -> None:
    before, after = measurement(), measurement(file=400_000)
    outputs = [
        Equivalence(output=name, cosine=cosine, snr_db=5.0, max_abs_error=1.0, num_examples=80)
        for name, cosine in (("logits", 0.5), ("near", 0.999), ("far", 0.7), ("farther", 0.6))
    ]
    said = judge(before, after, compare(before, after, Ratio(value=1.0, low=0.99, high=1.01), outputs))
    assert said.outcome == "mixed"
    assert said.summary.endswith("2 outputs changed (farther cosine 0.6000).")
    assert [sentence.split("'")[1] for sentence in said.worse] == ["far", "farther"]
    assert all("on 80 held-out examples" in sentence for sentence in said.worse)
    comparison = compare(before, after, Ratio(value=1.0, low=0.99, high=1.01), outputs)
    other = judge(before, after, comparison, quality_output="far")
    assert [sentence.split("'")[1] for sentence in other.worse] == ["logits", "farther"]


def test_one_example_proves_nothing() -> None:
    def of_one(value: float) -> Measurement:
        made = measurement(value=value, error=None)
        assert made.quality is not None
        return made.model_copy(update={"quality": made.quality.model_copy(update={"num_examples": 1})})

    said = verdict(of_one(0.0), baseline=of_one(1.0))
    assert said.outcome == "no_difference"
    assert any("cannot be told from one example" in sentence for sentence in said.within_noise)


def test_warnings_of_the_steps_are_kept_once() -> None:
    said = verdict(measurement(), warnings=("nothing got smaller", "nothing got smaller"))
    assert said.warnings == ("nothing got smaller",)


def test_a_busy_machine_is_said() -> None:
    assert any("busy" in warning for warning in verdict(measurement(), width=0.4).warnings)


@given(st.floats(0.1, 1000), st.integers(1000, 10**9), st.integers(0, 10**10), st.floats(0, 1), st.floats(0.0, 0.05))
def test_the_outcome_follows_from_the_sentences(p50: float, file: int, memory: int, value: float, width: float) -> None:
    said = verdict(measurement(p50=p50, file=file, memory=memory, value=value), width=width)
    expected = {
        (True, True): "mixed",
        (True, False): "better",
        (False, True): "worse",
        (False, False): "no_difference",
    }[bool(said.better), bool(said.worse)]
    assert said.outcome == expected
    assert len(said.better) + len(said.worse) + len(said.within_noise) == 4
    assert all(any(character.isdigit() for character in sentence) for sentence in (*said.better, *said.worse))
