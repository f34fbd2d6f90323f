"""The comparison that a distillation is for: teacher, student with it and without it, in numbers and in words."""

from collections.abc import Sequence
from math import hypot

from app.jobs.parents import Part, Parts
from app.jobs.trials import TrialRun, describe_values, list_outcomes
from app.recipes.metrics import Candidate, DistillationMetrics, Gain, Measurement, Metrics, Quality, Ratio, Verdict
from app.recipes.pipelines import Distillation, Values

CONFIDENCE = 1.96
"""Standard errors of a 95 % confidence interval."""
NAMES = {"teacher": "teacher", "student_alone": "student without teacher", "student": "student with teacher"}


def summarize(request: Distillation, parts: Parts, values: Values, runs: Sequence[TrialRun]) -> Metrics:
    """Return the student's metrics (its baseline is the teacher) with the whole comparison and its verdict in words."""
    student, alone = parts["student"], parts.get("student_alone")
    assert student.metrics is not None
    measured = student.metrics
    candidates = [_describe("teacher", student.job_id, measured.baseline, None)]
    gain = None
    if alone is not None and alone.metrics is not None:
        ratio = alone.metrics.comparison.latency_ratio
        candidates.append(_describe("student_alone", alone.job_id, alone.metrics.result, ratio))
        gain = measure_gain(measured.result.quality, alone.metrics.result.quality)
    teacher_gain = None
    if (teacher := parts.get("teacher")) is not None and teacher.metrics is not None:
        teacher_gain = measure_gain(teacher.metrics.result.quality, teacher.metrics.baseline.quality)
    ratio = measured.comparison.latency_ratio
    candidates.append(_describe("student", student.job_id, measured.result, ratio))
    chosen = request.draw_trials().index(values) if values else None
    return measured.model_copy(
        update={
            "distillation": DistillationMetrics(
                candidates=tuple(candidates),
                gain=gain,
                teacher_gain=teacher_gain,
                values=values,
                trials=list_outcomes(runs, chosen=chosen),
            ),
            "verdict": _extend(measured.verdict, gain, teacher_gain),
        }
    )


def measure_gain(after: Quality | None, before: Quality | None) -> Gain | None:
    """Return what was added to the second, with the error of the difference as of independent measurements."""
    if after is None or before is None:
        return None
    difference = after.value - before.value if after.higher_is_better else before.value - after.value
    error = None
    if after.standard_error is not None and before.standard_error is not None:
        error = hypot(after.standard_error, before.standard_error)
    return Gain(
        metric=after.metric,
        value=difference,
        standard_error=error,
        helped=None if error is None else difference > CONFIDENCE * error,
    )


def describe_gain(gain: Gain | None) -> str:
    """Return the answer to the question whether the teacher helped."""
    if gain is None:
        return "There is no student without the teacher to compare with, so it is unknown whether the teacher helped."
    size = f"{gain.metric} {gain.value:+.4f}"
    if gain.standard_error is None:
        return f"Student with teacher against student without: {size} (no standard error is known)."
    interval = f"{size} +- {CONFIDENCE * gain.standard_error:.4f} (95 %)"
    if gain.helped:
        return f"The teacher helped: {interval} against the same student without it."
    if gain.value < -CONFIDENCE * gain.standard_error:
        return f"The teacher did harm: {interval} against the same student without it. Use the one without."
    return f"No gain is proven: {interval} against the same student without it, which is within noise."


def describe_teacher_gain(gain: Gain) -> str:
    """Return what the first stage was worth."""
    size = f"{gain.metric} {gain.value:+.4f}"
    if gain.standard_error is None:
        return f"The teacher's training changed it by {size} (no standard error is known)."
    interval = f"{size} +- {CONFIDENCE * gain.standard_error:.4f} (95 %)"
    if gain.helped:
        return f"The teacher's training made it better: {interval} against the uploaded model."
    if gain.value < -CONFIDENCE * gain.standard_error:
        return f"The teacher's training made it worse: {interval} against the uploaded model. Leave it out."
    return f"No gain of the teacher's training is proven: {interval} against the uploaded model, which is within noise."


def write_report(request: Distillation, metrics: Metrics, alone: Part | None) -> str:
    """Return report.md."""
    found = metrics.distillation
    assert found is not None
    lines = [
        "# Distillation",
        "",
        metrics.verdict.summary,
        "",
        describe_gain(found.gain),
        "",
        *([describe_teacher_gain(found.teacher_gain), ""] if found.teacher_gain is not None else []),
        "| model | quality | latency p50 ms | against teacher | file bytes | parameters | MACs |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(each) for each in found.candidates),
        "",
    ]
    if alone is None:
        lines += ["The data has no labels, so no student could be trained without the teacher.", ""]
    elif alone.metrics is None:
        reason = alone.error.detail if alone.error else alone.state.value
        lines += [f"The student without teacher failed (job {alone.job_id}): {reason}", ""]
    epochs = request.training.epochs
    lines += [
        f"Both students have the same start, seed, settings and budget of {epochs} epochs; one seed was run. "
        "Latencies are comparable by the ratio to the teacher, which was measured in turns with each.",
        "",
    ]
    if found.trials:
        lines += [
            "## Trials",
            "",
            f"Chosen: {describe_values(found.values)}. The objective was measured on training rows set apart, not on "
            "the examples above.",
            "",
            "| rung | trial | epochs | values | objective | outcome | why |",
            "|---:|---:|---:|---|---:|---|---|",
        ]
        for trial in found.trials:
            objective = "-" if trial.objective is None else f"{trial.objective:.4f}"
            lines.append(
                f"| {trial.rung + 1} | {trial.number} | {trial.epochs} | {describe_values(trial.values)} | {objective} "
                f"| {trial.outcome} | {trial.why} |"
            )
        lines.append("")
    lines += ["## Student against teacher", ""]
    verdict = metrics.verdict
    for title, sentences in (
        ("Better", verdict.better),
        ("Worse", verdict.worse),
        ("Within noise", verdict.within_noise),
        ("Warnings", verdict.warnings),
    ):
        lines += [f"{title}:", *(f"- {sentence}" for sentence in sentences), ""] if sentences else []
    return "\n".join(lines)


def _describe(name: str, job_id: str, measured: Measurement, ratio: Ratio | None) -> Candidate:
    return Candidate.model_validate(
        {
            "name": name,
            "job_id": job_id,
            "quality": measured.quality,
            "file_bytes": measured.file_bytes,
            "parameters": measured.parameters,
            "macs": measured.macs,
            "p50_ms": measured.latency.p50_ms,
            "latency_ratio": ratio,
        }
    )


def _extend(verdict: Verdict, gain: Gain | None, teacher_gain: Gain | None) -> Verdict:
    sentence = describe_gain(gain)
    noisy = gain is not None and gain.helped is False and abs(gain.value) <= CONFIDENCE * (gain.standard_error or 0.0)
    field = "warnings"
    if gain is not None and gain.helped:
        field = "better"
    elif noisy:
        field = "within_noise"
    extended = verdict.model_copy(update={field: (*getattr(verdict, field), sentence)})
    if teacher_gain is None or teacher_gain.helped:
        return extended
    return extended.model_copy(update={"warnings": (*extended.warnings, describe_teacher_gain(teacher_gain))})


def _row(each: Candidate) -> str:
    quality = "-"
    if each.quality is not None:
        error = "" if each.quality.standard_error is None else f" +- {each.quality.standard_error:.4f}"
        quality = f"{each.quality.metric} {each.quality.value:.4f}{error}"
    ratio = each.latency_ratio
    against = "-" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    macs = "-" if each.macs is None else f"{each.macs:,}"
    return (
        f"| {NAMES[each.name]} | {quality} | {each.p50_ms:.3f} | {against} | {each.file_bytes:,} "
        f"| {each.parameters:,} | {macs} |"
    )
