"""The numbers of a job as a table: original against result, then the verdict. Plain text for any console."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pare.metrics import DistillationMetrics, LayerEffect, Measurement, Metrics, Quality
from pare.records import Verdict

NUM_SENSITIVE = 8
"""Layers listed by sensitivity; the JSON has all."""
OF_THE_MODEL = ("output_error", "output_divergence")
"""What is measured on the model's output; other effects are those on a layer itself."""


def metrics_table(metrics: Metrics) -> Table:
    """Return the before/after table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("original", "result", "result / original"):
        table.add_column(title, justify="right")
    for row in _rows(metrics):
        table.add_row(*row)
    return table


def verdict_text(verdict: Verdict) -> Text:
    """Return the verdict with what got better, worse, and what cannot be told apart from noise."""
    text = Text(verdict.summary)
    for sign, sentences in (
        ("+", verdict.better),
        ("-", verdict.worse),
        ("=", verdict.within_noise),
        ("!", verdict.warnings),
    ):
        for sentence in sentences:
            text.append(f"\n {sign} {sentence}")
    return text


def sensitivity_table(effects: Sequence[LayerEffect]) -> RenderableType:
    """Return the layers of one step that suffer most, with the effect of every choice; the one taken has a star.

    Where each layer has choices of its own (a rank, a sparsity), they stand in the rows.
    """
    layers: dict[str, dict[str, LayerEffect]] = {}
    for each in effects:
        layers.setdefault(each.layer, {})[each.choice] = each
    worst = sorted(layers, key=lambda name: -max(each.effect for each in layers[name].values()))[:NUM_SENSITIVE]
    metric = effects[0].metric
    of = "the model by each layer alone" if metric in OF_THE_MODEL else "each layer"
    title = f"step {effects[0].step}: {metric} of {of} (* chosen)"
    if len(layers) > len(worst):
        title += f", the {len(worst)} worst of {len(layers)}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer")
    choices = list(dict.fromkeys(each.choice for each in effects))
    if len(choices) > max(len(tried) for tried in layers.values()):
        table.add_column("choice")
        table.add_column(metric, justify="right")
        for name in worst:
            for row, each in enumerate(layers[name].values()):
                table.add_row(name if row == 0 else "", each.choice, _effect(each))
        return Group(Text(title), table)
    for choice in choices:
        table.add_column(choice, justify="right")
    for name in worst:
        table.add_row(name, *(_effect(layers[name].get(choice)) for choice in choices))
    return Group(Text(title), table)


def _effect(effect: LayerEffect | None) -> str:
    return "" if effect is None else f"{effect.effect:.2g}{'*' if effect.chosen else ' '}"


def distillation_table(compared: DistillationMetrics) -> RenderableType:
    """Return teacher and students side by side, with what tuning chose."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("quality", "latency p50", "/ teacher", "file size", "parameters"):
        table.add_column(title, justify="right")
    for each in compared.candidates:
        quality = "" if each.quality is None else _quality(each.quality)
        ratio = "" if each.latency_ratio is None else f"x{each.latency_ratio.value:.2f}"
        size = human_bytes(each.file_bytes)
        table.add_row(each.name.replace("_", " "), quality, _ms(each.p50_ms), ratio, size, f"{each.parameters:,}")
    chosen = ", ".join(f"{name} {value:g}" for name, value in compared.values.items())
    return (
        Group(table, Text(f"chosen of {len({t.number for t in compared.trials})} trials: {chosen}"))
        if chosen
        else table
    )


def report(metrics: Metrics) -> RenderableType:
    """Return table, comparison of a distillation, sensitivity where it was measured, and verdict."""
    steps = dict.fromkeys((each.step, each.metric) for each in metrics.sensitivity)
    tables = (
        sensitivity_table([each for each in metrics.sensitivity if (each.step, each.metric) == step]) for step in steps
    )
    compared = [] if metrics.distillation is None else [distillation_table(metrics.distillation)]
    return Group(metrics_table(metrics), *compared, *tables, verdict_text(metrics.verdict))


def to_text(renderable: RenderableType, width: int = 110) -> str:
    """Render to plain text without trailing blanks."""
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def human_bytes(size: float) -> str:
    """Return a size in the unit that reads best; binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable: GiB returns")


def _rows(metrics: Metrics) -> Iterator[tuple[str, str, str, str]]:
    old, new, change = metrics.baseline, metrics.result, metrics.comparison
    if old.quality is not None and new.quality is not None:
        yield (
            f"{new.quality.metric}, {new.quality.num_examples} held-out examples",
            _quality(old.quality),
            _quality(new.quality),
            "" if change.quality_change is None else f"{change.quality_change:+.4f}",
        )
    ratio = change.latency_ratio
    confidence = f"x{ratio.value:.2f} (95 % CI {ratio.low:.2f}..{ratio.high:.2f})"
    yield "latency p50", _ms(old.latency.p50_ms), _ms(new.latency.p50_ms), confidence
    yield (
        "latency p90",
        _ms(old.latency.p90_ms),
        _ms(new.latency.p90_ms),
        _ratio(new.latency.p90_ms, old.latency.p90_ms),
    )
    yield (
        "latency p99",
        _ms(old.latency.p99_ms),
        _ms(new.latency.p99_ms),
        _ratio(new.latency.p99_ms, old.latency.p99_ms),
    )
    yield (
        f"throughput, batch {new.latency.batch_size}, {new.latency.num_threads} thread(s)",
        f"{old.throughput_per_second:,.0f} /s",
        f"{new.throughput_per_second:,.0f} /s",
        _ratio(new.throughput_per_second, old.throughput_per_second),
    )
    yield "file size", human_bytes(old.file_bytes), human_bytes(new.file_bytes), f"x{change.file_ratio:.2f}"
    if new.packed_bytes is not None and change.packed_ratio is not None:
        packed = f"x{change.packed_ratio:.3f} of the file"
        yield "  packed file", "", human_bytes(new.packed_bytes), packed
    yield "parameters", f"{old.parameters:,}", f"{new.parameters:,}", f"x{change.parameters_ratio:.2f}"
    yield from _counted("  of these not zero", old, new)
    if old.macs is not None and new.macs is not None:
        yield "MACs per example", f"{old.macs:,}", f"{new.macs:,}", _ratio(new.macs, old.macs)
    yield (
        "peak memory",
        human_bytes(old.peak_memory_bytes),
        human_bytes(new.peak_memory_bytes),
        _ratio(new.peak_memory_bytes, old.peak_memory_bytes),
    )
    if old.peak_device_memory_bytes is not None and new.peak_device_memory_bytes is not None:
        yield (
            "peak memory on the GPU",
            human_bytes(old.peak_device_memory_bytes),
            human_bytes(new.peak_device_memory_bytes),
            _ratio(new.peak_device_memory_bytes, old.peak_device_memory_bytes),
        )
    for item in change.equivalence:
        snr = "equal" if item.snr_db is None else f"SNR {item.snr_db:.1f} dB"
        yield f"{item.output} against the original's", "", f"cosine {item.cosine:.4f}", snr


def _counted(label: str, old: Measurement, new: Measurement) -> Iterator[tuple[str, str, str, str]]:
    before, after = old.nonzero_parameters, new.nonzero_parameters
    if before != old.parameters or after != new.parameters:
        yield label, f"{before:,}", f"{after:,}", _ratio(after, before)


def _quality(quality: Quality) -> str:
    error = "" if quality.standard_error is None else f" +- {quality.standard_error:.4f}"
    return f"{quality.value:.4f}{error}"


def _ms(value: float) -> str:
    return f"{value:.3f} ms"


def _ratio(after: float, before: float) -> str:
    return f"x{after / before:.2f}" if before else ""
