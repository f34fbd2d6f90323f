"""What low rank does to a layer: the error of the ranks it got, and of a few more that it could have had."""

from collections.abc import Iterator

from app.recipes.metrics import LayerEffect
from worker.engine.low_rank.factors import Factors

SHARES = (0.25, 0.5, 0.75)
"""Of a layer's weights: for each, the ranks are tried whose factors have as many at most."""


def measure_effects(
    layer: str, factors: Factors, chosen: tuple[int, ...] | None, error: float, *, step: int, element_bytes: int
) -> list[LayerEffect]:
    """Return the effects on one layer, those of few ranks first. `error` is that of the chosen ranks, if there are any.

    Each error is that of factors that were really made, not the bound by which ranks are chosen.
    """
    errors = {ranks: factors.factorize(ranks)[1] for ranks in _list_ranks(factors) if ranks != chosen}
    if chosen is not None:
        errors[chosen] = error
    return [
        LayerEffect(
            step=step,
            layer=layer,
            choice=f"rank {'x'.join(map(str, ranks))}",
            metric="weight_error" if factors.gram is None else "layer_output_error",
            effect=errors[ranks],
            weight_bytes=factors.count(ranks) * element_bytes,
            chosen=ranks == chosen,
        )
        for ranks in sorted(errors, key=factors.count)
    ]


def _list_ranks(factors: Factors) -> Iterator[tuple[int, ...]]:
    for share in SHARES:
        fitting = [option for option in factors.options if option.num_weights <= share * factors.num_weights]
        if fitting:
            yield fitting[-1].ranks
