"""Pruning: removing weights (zeros that training respects) or whole structures (layers that get smaller)."""

from typing import ClassVar, Literal

from pydantic import Field

from app.recipes.base import BaseStep, DataNeed, Items


class PruneStructured(BaseStep):
    """Remove whole channels with everything that depends on them, so that layers become physically smaller."""

    kind: Literal["prune_structured"]
    """The technique."""
    ratio: float = Field(0.5, gt=0, lt=0.95)
    """Share of the channels to remove (before rounding), over all layers if `scope` is global, else in each."""
    criterion: Literal["magnitude", "taylor"] = "magnitude"
    """How channels are ranked: group L2 norm of the weights, or first-order Taylor |w * dL/dw| on labelled data."""
    scope: Literal["global", "local"] = "local"
    """Rank channels against those of all layers, or only within their own layer group."""
    round_to: int = Field(8, ge=1, le=256)
    """Keep channel counts a multiple of this: unrounded counts are often slower than the original."""
    num_batches: int = Field(8, ge=1, le=1024)
    """Batches of data used by the Taylor criterion."""
    batch_size: int = Field(64, ge=1, le=4096)
    """Examples per batch for the Taylor criterion."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers whose outputs keep their width. The layers that make the model's outputs are always kept."""

    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "Removes channels by dependency group; parameters, MACs and bytes really fall."

    def data_need(self) -> DataNeed:
        return DataNeed.LABELS if self.criterion == "taylor" else DataNeed.NONE


class PruneMagnitude(BaseStep):
    """Set the smallest weights to zero. Shapes, dense file size and dense speed stay as they were."""

    kind: Literal["prune_magnitude"]
    """The technique."""
    sparsity: float = Field(0.5, gt=0, lt=1)
    """Share of the prunable weights that becomes zero."""
    scope: Literal["global", "local"] = "global"
    """Rank weights against those of all layers, or only within their own layer."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave dense."""

    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "Zeroes the smallest weights and keeps them zero in training; dense files do not shrink."
    undone_by: ClassVar[dict[str, str]] = {
        "prune_structured": "removing channels afterwards would discard part of the zero pattern just chosen; "
        "prune structures first, then weights",
    }
