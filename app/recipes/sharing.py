"""Weight sharing: few distinct values per layer, stored as short indices into a codebook."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import BaseStep, DataNeed, Form, Items
from app.recipes.training import SingleProcessTraining


class ShareWeights(BaseStep):
    """Cluster the weights by k-means and keep an index per weight and a codebook (Han et al. 2015)."""

    kind: Literal["share_weights"]
    """The technique."""
    bits: int = Field(4, ge=1, le=8)
    """Bits per index: 2 ** bits clusters, one of which is zero where the weight was pruned."""
    num_clusters: int | None = Field(None, ge=2, le=256)
    """Clusters, where not a power of two; overrides `bits`."""
    rows_per_codebook: int | None = Field(None, ge=1, le=65536)
    """Output channels that share one codebook; null: one codebook per tensor."""
    initialization: Literal["linear", "density", "quantile"] = "linear"
    """Where centroids begin: evenly over the range, evenly over the cumulative distribution of the density, or at the
    quantiles of the weights."""
    max_iterations: int = Field(100, ge=1, le=10_000)
    """Of k-means; it stops earlier when nothing moves."""
    include_embeddings: bool = True
    """Cluster embedding tables too."""
    training: SingleProcessTraining | None = None
    """Fine-tune the centroids (every weight moves with its cluster); needs labels."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave as they are."""

    family: ClassVar[str] = "weight sharing"
    summary: ClassVar[str] = (
        "Clusters weights into codebooks; the packed file shrinks, in torch memory too; not faster."
    )
    takes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE, Form.CODED})
    leaves: ClassVar[Form] = Form.CODED

    def data_need(self) -> DataNeed:
        return DataNeed.NONE if self.training is None else DataNeed.LABELS

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_clusters is not None and self.changed("bits"):
            raise ValueError("bits and num_clusters say the same thing; set one of them")
        return self
