"""Original and result against each other, in numbers."""

from collections.abc import Iterable, Mapping

from app.recipes.facts import LayerFacts
from app.recipes.metrics import Comparison, Equivalence, LayerMetrics, Measurement, Ratio


def compare(
    baseline: Measurement, result: Measurement, latency_ratio: Ratio, equivalence: Iterable[Equivalence]
) -> Comparison:
    """Return the ratios, result / original; those without a base are None."""
    return Comparison(
        latency_ratio=latency_ratio,
        file_ratio=result.file_bytes / baseline.file_bytes,
        packed_ratio=_ratio(result.packed_bytes, baseline.file_bytes),
        parameters_ratio=result.parameters / baseline.parameters if baseline.parameters else 1.0,
        macs_ratio=_ratio(result.macs, baseline.macs),
        peak_memory_ratio=_ratio(result.peak_memory_bytes, baseline.peak_memory_bytes),
        peak_device_memory_ratio=_ratio(result.peak_device_memory_bytes, baseline.peak_device_memory_bytes),
        quality_change=(result.quality.value - baseline.quality.value if result.quality and baseline.quality else None),
        equivalence=tuple(equivalence),
    )


def compare_layers(
    before: Iterable[LayerFacts], after: Iterable[LayerFacts], nonzero_after: Mapping[str, int]
) -> tuple[LayerMetrics, ...]:
    """Return every layer of the original with what became of it, and then the layers that are new."""
    before, after = tuple(before), tuple(after)
    left = {layer.name: layer for layer in after}
    old = {layer.name for layer in before}
    rows = []
    for layer in before:
        now = left.get(layer.name)
        rows.append(
            LayerMetrics(
                name=layer.name,
                type=layer.type,
                parameters_before=layer.parameters,
                parameters_after=now.parameters if now else None,
                nonzero_after=nonzero_after.get(layer.name) if now else None,
                shape_before=layer.shape,
                shape_after=now.shape if now else None,
                macs_before=layer.macs,
                macs_after=now.macs if now else None,
            )
        )
    for layer in after:
        if layer.name not in old:
            rows.append(
                LayerMetrics(
                    name=layer.name,
                    type=layer.type,
                    parameters_before=0,
                    parameters_after=layer.parameters,
                    nonzero_after=nonzero_after.get(layer.name),
                    shape_before=(),
                    shape_after=layer.shape,
                    macs_before=None,
                    macs_after=layer.macs,
                )
            )
    return tuple(rows)


def _ratio(result: int | None, original: int | None) -> float | None:
    return result / original if result is not None and original else None
