"""The comparison in words. Each sentence holds its numbers, and each claim of a change has passed a stated test.

    latency   the whole confidence interval of the ratio is more than 3 % away from 1
    file      bytes changed by at least 1 %; the packed file, where there is one, against the same original
    memory    peak changed by at least 5 % and 1 MiB
    quality   changed by at least twice the standard error of the change
    outputs   those whose quality was not measured: mean cosine to the original below 0.99 counts as worse

Parameters and MACs explain these but decide nothing: fewer of them is not by itself faster, and zeros are not smaller.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from app.recipes.metrics import Comparison, Equivalence, Measurement, Quality, Ratio, Verdict

SMALLEST_LATENCY_CHANGE = 0.03
"""Two loads of the same file were seen to differ by about this much, whatever the interval within one pair says."""
SMALLEST_FILE_CHANGE = 0.01
SMALLEST_MEMORY_CHANGE = 0.05
SMALLEST_MEMORY_BYTES = 1024**2
STANDARD_ERRORS = 2.0
LOWEST_COSINE = 0.99
DECODED = "A gain in storage: it is decoded when it is loaded, so memory and speed are those of the dense model."
MANY_ZEROS = 0.1
"""Share of zeros from which the report says that they save nothing."""

OUTCOMES: dict[tuple[bool, bool], Literal["better", "mixed", "worse", "no_difference"]] = {
    (True, True): "mixed",
    (True, False): "better",
    (False, True): "worse",
    (False, False): "no_difference",
}
"""(something is better, something is worse) -> outcome."""

Side = Literal["better", "worse", "within_noise"]


@dataclass
class _Sentences:
    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    within_noise: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)

    def add(self, side: Side, sentence: str, short: str) -> None:
        getattr(self, side).append(sentence)
        self.short.append(short)


def judge(
    baseline: Measurement,
    result: Measurement,
    comparison: Comparison,
    *,
    quality_change_error: float | None = None,
    quality_output: str | None = None,
    warnings: Iterable[str] = (),
) -> Verdict:
    """Say what got better, what got worse and what is within noise.

    `quality_change_error` is the standard error of the paired quality difference; without it the two errors add up.
    `quality_output` is the output whose quality was measured; None means the first.
    """
    said = _Sentences()
    _judge_latency(said, baseline, result, comparison.latency_ratio)
    _judge_file(said, baseline, result, comparison.file_ratio)
    _judge_packed(said, baseline, result, comparison.packed_ratio)
    _judge_memory(said, "Peak memory", baseline.peak_memory_bytes, result.peak_memory_bytes, "above the bare runtime")
    before, after = baseline.peak_device_memory_bytes, result.peak_device_memory_bytes
    if before is not None and after is not None:
        _judge_memory(said, "Peak memory on the GPU", before, after, "of weights and activations")
    if baseline.quality is not None and result.quality is not None:
        _judge_quality(said, baseline.quality, result.quality, quality_change_error)
        measured = quality_output or comparison.equivalence[0].output
        _judge_outputs(said, [each for each in comparison.equivalence if each.output != measured], "held-out example")
    else:
        _judge_outputs(said, comparison.equivalence, "random input")
    outcome = OUTCOMES[bool(said.better), bool(said.worse)]
    return Verdict(
        outcome=outcome,
        summary=_summarize(outcome, said.short),
        better=tuple(said.better),
        worse=tuple(said.worse),
        within_noise=tuple(said.within_noise),
        warnings=tuple(dict.fromkeys((*warnings, *_warn(baseline, result, comparison)))),
    )


def is_clear(ratio: Ratio) -> bool:
    """Whether a latency ratio is a change and not noise."""
    return ratio.high < 1 - SMALLEST_LATENCY_CHANGE or ratio.low > 1 + SMALLEST_LATENCY_CHANGE


def _judge_latency(said: _Sentences, baseline: Measurement, result: Measurement, ratio: Ratio) -> None:
    numbers = (
        f"p50 {_milliseconds(baseline.latency.p50_ms)} to {_milliseconds(result.latency.p50_ms)} at batch "
        f"{result.latency.batch_size} on {_count(result.latency.num_threads, 'thread')}, "
        f"ratio {ratio.value:.3f} (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
    )
    macs = ""
    if baseline.macs and result.macs is not None and result.macs != baseline.macs:
        change = result.macs / baseline.macs - 1
        macs = f"; MACs {'fell' if change < 0 else 'rose'} by {abs(change):.0%} to {result.macs:,}"
    if not is_clear(ratio):
        said.add("within_noise", f"Latency is the same within noise: {numbers}{macs}.", "as fast")
    elif ratio.value < 1:
        said.add("better", f"Faster {1 / ratio.value:.2f} times: {numbers}{macs}.", f"{1 / ratio.value:.2f}x faster")
    else:
        said.add("worse", f"Slower {ratio.value:.2f} times: {numbers}{macs}.", f"{ratio.value:.2f}x slower")


def _judge_file(said: _Sentences, baseline: Measurement, result: Measurement, ratio: float) -> None:
    numbers = f"{_bytes(baseline.file_bytes)} to {_bytes(result.file_bytes)}"
    if result.parameters != baseline.parameters:
        numbers += f", numbers stored {baseline.parameters:,} to {result.parameters:,}"
    if abs(ratio - 1) < SMALLEST_FILE_CHANGE:
        said.add("within_noise", f"The file is as large as it was: {numbers}.", "as large")
    elif ratio < 1:
        said.add("better", f"The file is {1 - ratio:.0%} smaller: {numbers}.", f"{1 - ratio:.0%} smaller")
    else:
        said.add("worse", f"The file is {ratio - 1:.0%} larger: {numbers}.", f"{ratio - 1:.0%} larger")


def _judge_packed(said: _Sentences, baseline: Measurement, result: Measurement, ratio: float | None) -> None:
    if ratio is None or result.packed_bytes is None:
        return
    numbers = (
        f"{_bytes(result.packed_bytes)} packed, all included, against {_bytes(baseline.file_bytes)} of the original's "
        "file"
    )
    if abs(ratio - 1) < SMALLEST_FILE_CHANGE:
        said.add("within_noise", f"The packed file is as large as the original's: {numbers}.", "packed as large")
    elif ratio > 1:
        said.add("worse", f"The packed file is {ratio - 1:.0%} larger: {numbers}.", f"packed {ratio - 1:.0%} larger")
    else:
        times = f"{1 / ratio:.1f}x"
        said.add("better", f"The packed file is {times} smaller: {numbers}. {DECODED}", f"packed {times} smaller")


def _judge_memory(said: _Sentences, name: str, before: int, after: int, of_what: str) -> None:
    numbers = f"{_bytes(before)} to {_bytes(after)} {of_what}"
    if abs(after - before) < max(SMALLEST_MEMORY_CHANGE * before, SMALLEST_MEMORY_BYTES):
        said.within_noise.append(f"{name} is the same within noise: {numbers}.")
    elif after < before:
        said.better.append(f"{name} fell by {1 - after / before:.0%}: {numbers}.")
    else:
        share = f"{after / before - 1:.0%}" if before else ""
        what = name[0].lower() + name[1:]
        said.add("worse", f"{name} rose{share and f' by {share}'}: {numbers}.", f"{share and f'{share} '}more {what}")


def _judge_quality(said: _Sentences, before: Quality, after: Quality, change_error: float | None) -> None:
    name = after.metric.replace("_", " ")
    change = after.value - before.value
    errors = [each.standard_error for each in (before, after) if each.standard_error is not None]
    error = change_error if change_error is not None else sum(each**2 for each in errors) ** 0.5
    numbers = f"{before.value:.4g} to {after.value:.4g} on {after.num_examples:,} examples"
    if error:
        numbers += f" (change {change:+.4f}, standard error {error:.4f})"
    if after.num_examples < 2 and change:
        said.add("within_noise", f"Quality ({name}) cannot be told from one example: {numbers}.", f"{name} unknown")
    elif abs(change) <= STANDARD_ERRORS * error:
        same = "the same" if change == 0 else "the same within noise"
        said.add("within_noise", f"Quality ({name}) is {same}: {numbers}.", f"{name} {same}")
    elif (change > 0) == after.higher_is_better:
        said.add("better", f"Quality ({name}) is better: {numbers}.", f"{name} better by {abs(change):.3g}")
    else:
        said.add("worse", f"Quality ({name}) is worse: {numbers}.", f"{name} worse by {abs(change):.3g}")


def _judge_outputs(said: _Sentences, equivalence: Iterable[Equivalence], noun: str) -> None:
    different = []
    for each in equivalence:
        numbers = (
            f"output {each.output!r} has mean cosine {each.cosine:.5f} to the original"
            f"{'' if each.snr_db is None else f' (signal to noise {each.snr_db:.1f} dB)'} "
            f"on {_count(each.num_examples, noun)}"
        )
        if each.cosine < LOWEST_COSINE:
            said.worse.append(f"Outputs differ: {numbers}.")
            different.append(each)
        else:
            said.within_noise.append(f"Outputs agree: {numbers}.")
    if different:
        farthest = min(different, key=lambda each: each.cosine)
        said.short.append(
            f"{_count(len(different), 'output')} changed ({farthest.output} cosine {farthest.cosine:.4f})"
        )


def _warn(baseline: Measurement, result: Measurement, comparison: Comparison) -> Iterable[str]:
    zeros, zeros_before = (each.parameters - each.nonzero_parameters for each in (result, baseline))
    if result.parameters and zeros - zeros_before > MANY_ZEROS * result.parameters:
        left_out = " The packed file leaves them out." if result.packed_bytes is not None else ""
        yield (
            f"{zeros:,} of {result.parameters:,} stored numbers are zero ({zeros / result.parameters:.0%}); zeros are "
            f"stored and computed like other numbers, so they make this file neither smaller nor faster.{left_out}"
        )
    if result.quality is None:
        yield "Quality was not measured because the recipe has no data; outputs were compared on random inputs."
    if comparison.latency_ratio.high > 1.5 * comparison.latency_ratio.low:
        yield "The machine was busy while latency was measured, so its interval is wide; measure again when it is idle."


def _summarize(outcome: str, short: list[str]) -> str:
    if outcome == "no_difference":
        return f"No difference beyond noise: {', '.join(short)}."
    return f"{outcome.capitalize()}: {', '.join(short)}."


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _bytes(value: int) -> str:
    if value < 1000:
        return f"{value} B"
    size = float(value)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
    raise AssertionError(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
