"""Pruning: removing weights (zeros that training respects) or whole structures (layers that get smaller)."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import BaseStep, DataNeed, Items
from app.recipes.training import InnerTraining

_ZEROS_LOST = {
    "prune_structured": "removing channels afterwards would discard part of the zero pattern just chosen; "
    "prune structures first, then weights",
    "derive_student": "removing channels afterwards would discard part of the zero pattern just chosen; "
    "derive the student first, then prune weights",
    "factorize_low_rank": "the factors of a sparse matrix are dense, so the zeros just chosen would be lost; "
    "factorize first, then prune the factors",
}


class PruneStructured(BaseStep):
    """Remove whole channels, attention heads and hidden units with everything that depends on them."""

    kind: Literal["prune_structured"]
    """The technique."""
    ratio: float = Field(0.5, gt=0, lt=0.95)
    """How much to remove, as a share of what `of` names."""
    of: Literal["channels", "macs", "parameters", "latency"] = "channels"
    """What `ratio` counts: channels (before rounding), multiply-accumulates, parameters, or measured latency at the
    recipe's target."""
    structures: Items[Literal["channels", "hidden_units", "heads", "width"]] = Field(
        ("channels", "hidden_units", "heads"), max_length=4, json_schema_extra={"minItems": 1}
    )
    """What may be removed: convolution channels, hidden units of linear and recurrent layers, whole attention heads
    (with grouped queries: a key/value head with its group), and the width of embeddings and of streams that several
    layers add to (residual connections), which costs the most quality."""
    criterion: Literal["magnitude", "group_norm", "batch_norm_scale", "taylor"] = "group_norm"
    """How importance is judged: L2 norm of the layer's own filter; of the whole dependency group; the scale of the
    following batch norm (Liu et al. 2017); first-order Taylor |w * dL/dw| on labelled data (Molchanov et al. 2019)."""
    scope: Literal["global", "local"] = "local"
    """Rank structures only within their own layer group, or against those of all layers; with `taylor` and a share of
    MACs or parameters, global ranks by the change of the loss per MAC or parameter saved."""
    round_to: int = Field(8, ge=1, le=256)
    """Keep channel counts a multiple of this: unrounded counts are often slower than the original."""
    compensate: bool = True
    """Adjust the layers that read removed channels so that their outputs stay close to what they were: least squares on
    training examples, labels not needed. Left out where the recipe has no data."""
    num_calibration_examples: int = Field(256, ge=1, le=65536)
    """Training examples used to compensate."""
    num_iterations: int = Field(1, ge=1, le=100)
    """Remove in this many rounds, judging importance anew in each."""
    training: InnerTraining | None = None
    """Training after every round but the last (add a `finetune` step for that); needs labels."""
    num_batches: int = Field(8, ge=1, le=1024)
    """Batches of data used by the Taylor criterion."""
    batch_size: int = Field(64, ge=1, le=4096)
    """Examples per batch for the Taylor criterion."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers whose outputs keep their width. The layers that make the model's outputs are always kept."""

    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "Removes channels, heads and hidden units; parameters, MACs and bytes really fall."

    def data_need(self) -> DataNeed:
        learns = self.criterion == "taylor" or self.training is not None
        return DataNeed.LABELS if learns else DataNeed.NONE

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.structures:
            raise ValueError("structures is empty; name what may be removed")
        if self.training is not None and self.num_iterations == 1:
            raise ValueError("training runs between rounds, and num_iterations is 1; add a finetune step instead")
        return self


class PruneMagnitude(BaseStep):
    """Set the smallest weights to zero. Shapes and dense speed stay; a `packed` artifact really gets smaller."""

    kind: Literal["prune_magnitude"]
    """The technique."""
    sparsity: float = Field(0.5, gt=0, lt=1)
    """Share of the prunable weights that becomes zero."""
    scope: Literal["global", "local"] = "global"
    """Rank weights against those of all layers, or only within their own layer."""
    schedule: Literal["one_shot", "cubic", "linear"] = "one_shot"
    """All at once, or in rounds with training between: cubic prunes early and slows down (Zhu and Gupta 2017)."""
    num_iterations: int = Field(5, ge=2, le=100)
    """Rounds of a gradual schedule."""
    training: InnerTraining | None = None
    """Training after every round but the last of a gradual schedule (add a `finetune` step for that); needs labels."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave dense."""

    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "Zeroes the smallest weights and keeps them zero in training; packed files shrink."
    fills_zeros: ClassVar[bool] = True
    undone_by: ClassVar[dict[str, str]] = _ZEROS_LOST

    def data_need(self) -> DataNeed:
        return DataNeed.NONE if self.training is None else DataNeed.LABELS

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule == "one_shot" and self.training is not None:
            raise ValueError("training runs between the rounds of a gradual schedule; add a finetune step instead")
        if self.schedule != "one_shot" and self.training is None:
            raise ValueError(f"schedule {self.schedule!r} trains between its rounds; set training, e.g. to {{}}")
        return self


class PruneNM(BaseStep):
    """Keep the n largest of every m neighbouring weights: the pattern that sparse tensor cores execute (2:4)."""

    kind: Literal["prune_n_m"]
    """The technique."""
    n: int = Field(2, ge=1, le=31)
    """Weights kept in each block."""
    m: int = Field(4, ge=2, le=32)
    """Weights in a block."""
    axis: Literal["input", "output"] = "input"
    """Blocks run along the input axis (what tensor cores want) or along the output axis of a layer."""
    criterion: Literal["magnitude", "wanda"] = "magnitude"
    """Judge a weight by |w|, or by |w| times the norm of its input activation (Sun et al. 2023; needs data)."""
    num_calibration_examples: int = Field(128, ge=1, le=65536)
    """Wanda only: training examples used for the norms."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave dense."""

    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "Zeroes m-n of every m weights; smaller when packed, faster only on sparse tensor cores."
    fills_zeros: ClassVar[bool] = True
    undone_by: ClassVar[dict[str, str]] = _ZEROS_LOST

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS if self.criterion == "wanda" else DataNeed.NONE

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"n is {self.n} and m is {self.m}; keeping n of m weights prunes only when n < m")
        return self


class PruneWanda(BaseStep):
    """Zero, in every output row, the weights with the smallest |weight| * ||input activation|| (Sun et al. 2023)."""

    kind: Literal["prune_wanda"]
    """The technique."""
    sparsity: float = Field(0.5, gt=0, lt=1)
    """Share of the weights of each output row that becomes zero."""
    num_calibration_examples: int = Field(128, ge=1, le=65536)
    """Training examples used for the activation norms; labels are not needed."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave dense."""

    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "Zeroes weights judged with their activations, without training; packed files shrink."
    fills_zeros: ClassVar[bool] = True
    undone_by: ClassVar[dict[str, str]] = _ZEROS_LOST

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS
