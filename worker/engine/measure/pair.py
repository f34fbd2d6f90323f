"""Measuring original and result side by side: same process, same runtime, same inputs, taking turns."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.recipes.metrics import Comparison, Measurement, Quality
from app.recipes.recipe import Target
from worker.engine.measure.compare import compare
from worker.engine.measure.equivalence import compare_outputs
from worker.engine.measure.latency import Seconds, estimate_ratio, summarize
from worker.engine.measure.memory import measure_peak_memory
from worker.engine.measure.padding import find_mask
from worker.engine.measure.runtimes import Arrays, measured_on, open_model, time_models
from worker.engine.measure.size import ParameterCount
from worker.engine.programs.program import Signature
from worker.engine.training.examples import BoundExamples
from worker.engine.training.quality import evaluate_pair

EVALUATION_BATCH = 64
"""Examples per call while quality is measured, where the batch may vary."""


@dataclass(frozen=True)
class Subject:
    """One of the two models: its file in the target's runtime format, and what was counted before it was written."""

    path: Path
    parameters: ParameterCount
    macs: int | None
    uncounted_operators: tuple[str, ...]
    packed_bytes: int | None = None
    """Of the packed file, where there is one."""


@dataclass(frozen=True)
class Pair:
    """Both measured, and compared."""

    baseline: Measurement
    result: Measurement
    comparison: Comparison
    quality_change_error: float | None
    """Standard error of the change of quality, example by example."""
    quality_output: str | None
    """The output whose quality was measured, if any was."""


def measure_pair(
    original: Subject,
    result: Subject,
    signature: Signature,
    target: Target,
    inputs: list[Arrays],
    examples: BoundExamples | None,
    *,
    seed: int,
    directory: Path,
    report: Callable[[float, str], None],
) -> Pair:
    """Measure speed and memory on the first of `inputs`, equivalence on all, quality on the held-out examples."""
    device = measured_on(target)
    predicts = [
        open_model(each.path, target.runtime, signature, target.num_threads, device) for each in (original, result)
    ]
    report(0.05, "outputs")
    equivalence = compare_outputs(
        [each.name for each in signature.outputs],
        [(predicts[0](batch), predicts[1](batch)) for batch in inputs],
        [find_mask([each.name for each in signature.inputs], batch) for batch in inputs],
    )
    report(0.15, "quality")
    pair = (
        evaluate_pair(predicts[0], predicts[1], examples, batch_size=_evaluation_batch(signature)) if examples else None
    )
    report(0.4, "latency")
    batch = inputs[0]
    timings = time_models(
        predicts[0],
        predicts[1],
        batch,
        target.num_runs,
        lambda fraction: report(0.4 + 0.4 * fraction, "latency"),
    )
    report(0.8, "memory")
    peaks = [
        measure_peak_memory(each.path, target.runtime, signature, batch, target.num_threads, directory, device)
        for each in (original, result)
    ]

    def conclude(index: int, subject: Subject, seconds: Seconds, quality: Quality | None) -> Measurement:
        latency = summarize(seconds, batch_size=len(batch[0]), num_threads=target.num_threads)
        return Measurement(
            quality=quality,
            latency=latency,
            throughput_per_second=1e3 * latency.batch_size / latency.p50_ms,
            peak_memory_bytes=peaks[index].host_bytes,
            peak_device_memory_bytes=peaks[index].device_bytes,
            file_bytes=subject.path.stat().st_size,
            packed_bytes=subject.packed_bytes,
            parameters=subject.parameters.total,
            nonzero_parameters=subject.parameters.nonzero,
            macs=subject.macs,
            uncounted_operators=subject.uncounted_operators,
        )

    before = conclude(0, original, timings.original, pair.baseline if pair else None)
    after = conclude(1, result, timings.result, pair.result if pair else None)
    comparison = compare(before, after, estimate_ratio(timings, seed), equivalence)
    return Pair(
        before,
        after,
        comparison,
        quality_change_error=pair.change_error if pair else None,
        quality_output=signature.outputs[examples.output_index].name if examples else None,
    )


def _evaluation_batch(signature: Signature) -> int:
    _, highest = signature.dynamic_ranges.get("batch", (1, None))
    return EVALUATION_BATCH if highest is None else min(EVALUATION_BATCH, highest)
