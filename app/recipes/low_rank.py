"""Low rank: one large layer becomes two or three small ones."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import BaseStep, DataNeed, Items


class FactorizeLowRank(BaseStep):
    """Replace weight matrices by products of thin ones: SVD for linear layers, Tucker-2 or spatial for convolutions."""

    kind: Literal["factorize_low_rank"]
    """The technique."""
    rank_by: Literal["ratio", "rank", "energy", "budget"] = "ratio"
    """How ranks are chosen; the field of the same name holds the number."""
    ratio: float = Field(0.5, gt=0, lt=1)
    """`ratio`: share of each layer's weights that its factors may have together."""
    rank: int = Field(32, ge=1, le=65536)
    """`rank`: the same rank in every layer."""
    energy: float = Field(0.9, gt=0, lt=1)
    """`energy`: the smallest rank that keeps this share of the squared singular values."""
    budget: float = Field(0.5, gt=0, lt=1)
    """`budget`: share of the weights of all these layers together, spread so that the summed error is smallest."""
    convolutions: Literal["tucker2", "spatial", "none"] = "tucker2"
    """1x1 - kxk - 1x1 (Kim et al. 2016), kx1 - 1xk (Jaderberg et al. 2014), or leave convolutions alone."""
    whiten: bool = False
    """Minimize the error of the outputs on real activations instead of that of the weights (needs data)."""
    num_calibration_examples: int = Field(128, ge=1, le=65536)
    """`whiten` only: training examples whose activations are used; labels are not needed."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave whole."""

    family: ClassVar[str] = "low rank"
    summary: ClassVar[str] = "Replaces layers by thinner products; parameters and MACs fall, a layer never grows."

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS if self.whiten else DataNeed.NONE

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.changed(*{"ratio", "rank", "energy", "budget"} - {self.rank_by})
        if given:
            raise ValueError(f"rank_by is {self.rank_by!r}, so {given} would have no effect; leave it out")
        return self
