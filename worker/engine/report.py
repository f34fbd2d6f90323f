"""report.md: the before and after of a job for people."""

from collections.abc import Callable

from app.recipes.metrics import Environment, LayerEffect, Measurement, Metrics

MAX_LAYERS = 40
"""Largest layers listed; the metrics have them all."""
OF_THE_MODEL = ("output_error", "output_divergence")
"""What is measured on the model's output; other effects are those on a layer itself."""


def write_report(metrics: Metrics) -> str:
    """Return the report as Markdown."""
    verdict = metrics.verdict
    parts = ["# Pare report", "", verdict.summary, "", *_compare(metrics), ""]
    for title, sentences in (
        ("Better", verdict.better),
        ("Worse", verdict.worse),
        ("Within noise", verdict.within_noise),
        ("Warnings", verdict.warnings),
    ):
        if sentences:
            parts += [f"## {title}", "", *(f"- {sentence}" for sentence in sentences), ""]
    parts += ["## Steps", "", *_list_steps(metrics), "", "## Outputs compared with the original", ""]
    parts += [*_list_outputs(metrics), ""]
    if metrics.sensitivity:
        parts += ["## Sensitivity", "", *_list_sensitivity(metrics)]
    parts += ["## Layers", "", *_list_layers(metrics), "", "## Measured on", ""]
    environment = metrics.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    parts += [
        f"- processor: {environment.processor}, {environment.num_cores} cores",
        *_list_device(environment),
        f"- runtime: {environment.runtime}, {_threads(environment.num_threads)}",
        f"- isolation: {', '.join(environment.isolation) or 'none'}",
        f"- versions: {versions}",
        "",
        "`python load.py --check` loads the model without Pare and compares it with the sample output.",
        "",
    ]
    return "\n".join(parts)


def _list_device(environment: Environment) -> list[str]:
    device = environment.device
    if device is None:
        return []
    return [
        f"- GPU of the steps: {device.name}, {_bytes(device.memory_bytes)}, compute capability "
        f"{device.compute_capability}, driver {device.driver or 'unknown'}, CUDA {device.cuda_version}",
        f"- measured on: {environment.target_device}",
    ]


def _compare(metrics: Metrics) -> list[str]:
    before, after, comparison = metrics.baseline, metrics.result, metrics.comparison
    ratio = comparison.latency_ratio
    latency = f"{ratio.value:.3f} (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
    rows = [_row("", "original", "result", "result / original"), "|---|---:|---:|---:|"]

    def add(title: str, value: Callable[[Measurement], str], change: str = "") -> None:
        rows.append(_row(title, value(before), value(after), change))

    if before.quality is not None and after.quality is not None:
        change = "" if comparison.quality_change is None else f"{comparison.quality_change:+.4f}"
        add(f"{before.quality.metric.replace('_', ' ')}", _quality, change)
    add("latency p50", lambda each: f"{each.latency.p50_ms:.4g} ms", latency)
    add("latency p90", lambda each: f"{each.latency.p90_ms:.4g} ms")
    add("latency p99", lambda each: f"{each.latency.p99_ms:.4g} ms")
    add("throughput", lambda each: f"{each.throughput_per_second:,.0f} / s")
    add("peak memory", lambda each: f"{each.peak_memory_bytes:,} B", _optional(comparison.peak_memory_ratio))
    if after.peak_device_memory_bytes is not None:
        change = _optional(comparison.peak_device_memory_ratio)
        add("peak memory on the GPU", lambda each: _bytes(each.peak_device_memory_bytes), change)
    add("file", lambda each: f"{each.file_bytes:,} B", f"{comparison.file_ratio:.3f}")
    if after.packed_bytes is not None:
        add("packed file", lambda each: _bytes(each.packed_bytes), f"{_optional(comparison.packed_ratio)} of the file")
    add("numbers stored", lambda each: f"{each.parameters:,}", f"{comparison.parameters_ratio:.3f}")
    add("of these not zero", lambda each: f"{each.nonzero_parameters:,}")
    add(
        "MACs per example",
        lambda each: _number(each.macs),
        _optional(comparison.macs_ratio),
    )
    rows += [
        "",
        f"Latency: batch {after.latency.batch_size}, {_threads(after.latency.num_threads)}, {after.latency.num_runs} "
        "interleaved calls of each model.",
    ]
    return rows


def _quality(measurement: Measurement) -> str:
    quality = measurement.quality
    assert quality is not None
    error = "" if quality.standard_error is None else f" +- {quality.standard_error:.4f}"
    return f"{quality.value:.4f}{error}"


def _list_steps(metrics: Metrics) -> list[str]:
    rows = [
        _row("step", "seconds", "parameters", "not zero", "MACs", "packed weights", "facts"),
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for step in metrics.steps:
        facts = ", ".join(f"{name} {_fact(value)}" for name, value in step.facts.items())
        counts = (step.parameters, step.nonzero_parameters, step.macs)
        numbers = map(_number, counts)
        packed = _bytes(step.packed_bytes)
        rows.append(_row(f"{step.index} {step.kind}", f"{step.seconds:.1f}", *numbers, packed, facts))
    return rows


def _list_outputs(metrics: Metrics) -> list[str]:
    rows = [_row("output", "mean cosine", "signal to noise", "largest error", "examples"), "|---|---:|---:|---:|---:|"]
    for each in metrics.comparison.equivalence:
        noise = "equal" if each.snr_db is None else f"{each.snr_db:.1f} dB"
        rows.append(_row(each.output, f"{each.cosine:.6f}", noise, f"{each.max_abs_error:.3g}", f"{each.num_examples}"))
    return rows


def _list_layers(metrics: Metrics) -> list[str]:
    largest = sorted(metrics.layers, key=lambda layer: -layer.parameters_before)[:MAX_LAYERS]
    shown = {layer.name for layer in largest}
    rows = [_row("layer", "type", "shape", "parameters", "not zero"), "|---|---|---|---:|---:|"]
    for layer in metrics.layers:
        if layer.name in shown:
            shape_after = "gone" if layer.shape_after is None else list(layer.shape_after)
            rows.append(
                _row(
                    layer.name,
                    layer.type,
                    f"{list(layer.shape_before)} to {shape_after}",
                    f"{layer.parameters_before:,} to {_number(layer.parameters_after)}",
                    _number(layer.nonzero_after),
                )
            )
    if len(metrics.layers) > len(largest):
        rows += ["", f"The {len(largest)} largest of {len(metrics.layers)} layers."]
    return rows


def _list_sensitivity(metrics: Metrics) -> list[str]:
    """List, for each step that measured it, the layers that suffer most; the choice taken is bold."""
    rows: list[str] = []
    for step, metric in dict.fromkeys((each.step, each.metric) for each in metrics.sensitivity):
        effects = [each for each in metrics.sensitivity if (each.step, each.metric) == (step, metric)]
        choices = list(dict.fromkeys(each.choice for each in effects))
        layers: dict[str, dict[str, LayerEffect]] = {}
        for each in effects:
            layers.setdefault(each.layer, {})[each.choice] = each
        worst = sorted(layers, key=lambda name: -max(each.effect for each in layers[name].values()))[:MAX_LAYERS]
        of = "the model when one layer alone is changed" if metric in OF_THE_MODEL else "each layer"
        rows += [
            f"Step {step}: {metric.replace('_', ' ')} of {of}, worst first; bold was chosen. {len(worst)} of "
            f"{len(layers)} layers.",
            "",
        ]
        # A rank or a sparsity is a layer's own: a column for each would leave the table empty.
        if len(choices) > max(len(tried) for tried in layers.values()):
            rows += [_row("layer", "choice", metric.replace("_", " ")), "|---|---|---:|"]
            rows += [_row(name, each.choice, _effect(each)) for name in worst for each in layers[name].values()]
        else:
            rows += [_row("layer", *choices), "|---|" + "---:|" * len(choices)]
            rows += [_row(name, *(_effect(layers[name].get(choice)) for choice in choices)) for name in worst]
        rows.append("")
    return rows


def _effect(effect: LayerEffect | None) -> str:
    if effect is None:
        return "-"
    return f"**{effect.effect:.3g}**" if effect.chosen else f"{effect.effect:.3g}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value:,} B"


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _optional(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _fact(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
