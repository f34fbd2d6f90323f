"""Training steps: what runs on the one training loop."""

from typing import ClassVar, Literal

from pydantic import Field

from app.recipes.base import BaseStep, DataNeed


class Finetune(BaseStep):
    """Train the model as it now is on the recipe's labelled data, to recover quality after compression."""

    kind: Literal["finetune"]
    """The technique."""
    epochs: int = Field(3, ge=1, le=1000)
    """Passes over the training part of the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(64, ge=1, le=65536)
    """Examples per optimizer step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9 and Nesterov."""
    learning_rate: float = Field(1e-3, gt=0, le=10)
    """Peak learning rate."""
    weight_decay: float = Field(1e-4, ge=0, le=1)
    """Decoupled weight decay; never on biases and norms."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the run; cosine falls to zero."""
    warmup_fraction: float = Field(0.05, ge=0, le=0.5)
    """Share of the steps over which the learning rate rises from zero."""
    gradient_clip_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm to this; null switches it off."""
    keep_best: bool = True
    """Keep the weights of the best epoch, the start included, judged on a tenth of the training rows set apart."""

    family: ClassVar[str] = "training"
    summary: ClassVar[str] = "Recovers quality on labelled data; pruned weights stay pruned."

    def data_need(self) -> DataNeed:
        return DataNeed.LABELS
