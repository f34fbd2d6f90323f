"""Training steps: what runs on the one training loop."""

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from app.recipes.base import BaseStep, DataNeed, Items, Spec
from app.recipes.parallel import Parallel


class TrainingSettings(Spec):
    """How long, how fast and in which precision to train."""

    epochs: int = Field(3, ge=1, le=1000)
    """Passes over the training part of the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(64, ge=1, le=65536)
    """Examples per optimizer step."""
    accumulate: int = Field(1, ge=1, le=1024)
    """Split each batch into this many parts whose gradients are added up: less memory, and the same step but for batch
    norms, which see one part at a time."""
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    """AdamW, Adam, SGD with Nesterov momentum, or RMSprop."""
    learning_rate: float = Field(1e-3, gt=0, le=10)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD and RMSprop."""
    weight_decay: float = Field(1e-4, ge=0, le=1)
    """Weight decay (decoupled in AdamW); never on biases and norms."""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine and linear fall to zero, step divides by ten at half and 3/4."""
    warmup_fraction: float = Field(0.05, ge=0, le=0.5)
    """Share of the steps over which the learning rate rises from zero."""
    gradient_clip_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm to this; null switches it off."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Classification only: share of the probability spread over all classes."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass. tf32 multiplies with 10 bits of mantissa, on GPUs only; bf16 with 7.
    Weights, sums and the optimizer stay fp32."""
    compile: bool = False
    """Translate the model into fused kernels first (torch.compile): takes a while once, then steps may be faster.
    The weights are the same up to rounding. The worker needs a C++ compiler."""
    augmentations: Items[Literal["flip", "crop"]] = Field((), max_length=2)
    """Of 4-d image inputs (channels first): mirror left and right; shift by up to an eighth of the size."""
    keep_best: bool = True
    """Keep the weights of the best epoch, the start included, judged on a tenth of the training rows set apart."""
    patience: int | None = Field(None, ge=1, le=1000)
    """Stop early after this many epochs without a better one (needs keep_best); null trains to the end."""

    parallel: Parallel | None = None
    """Spread the step over several processes; null: one. The weights are those of one process with the same batch,
    up to rounding and to which activations dropout drops."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.parallel is None:
            return self
        parts = self.parallel.data * self.parallel.microbatches
        if self.batch_size < parts:
            stages = f" x {self.parallel.microbatches} micro-batches" if self.parallel.pipeline > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size} is less than data {self.parallel.data}{stages}: every part needs an "
                "example"
            )
        if self.accumulate > 1 and self.parallel.pipeline > 1:
            raise ValueError("accumulate splits the batch, which a pipeline does already: set num_microbatches instead")
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.compile and self.parallel is not None and self.parallel.num_ranks > 1:
            raise ValueError(
                f"compile goes with one process, not with {self.parallel.describe()}: ranks meet inside the model, "
                "which kernels cannot wait for; leave compile or parallel out"
            )
        return self

    @model_validator(mode="after")
    def _check_patience(self) -> Self:
        if self.patience is not None and not self.keep_best:
            raise ValueError("patience counts the epochs without a better one, which only keep_best looks for")
        return self


class SingleProcessTraining(TrainingSettings):
    """Training inside another technique, which runs in one process."""

    parallel: None = None
    """Not possible here: only steps that do nothing but train are spread over processes."""

    @field_validator("parallel", mode="before")
    @classmethod
    def _refuse_parallel(cls, plan: object) -> object:
        if plan is not None:
            raise ValueError(
                "training inside another step runs in one process; leave parallel out (finetune, train, distill and "
                "quantize_aware_training take it)"
            )
        return plan


class InnerTraining(SingleProcessTraining):
    """Training between the rounds of another technique."""

    compile: Literal[False] = False
    """Rounds are too short to be compiled for; put a finetune step with `compile` behind the step instead."""


class Finetune(TrainingSettings, BaseStep):
    """Train the model as it now is on the recipe's labelled data, to recover quality after compression."""

    kind: Literal["finetune"]
    """The technique."""

    family: ClassVar[str] = "training"
    summary: ClassVar[str] = "Recovers quality on labelled data; pruned weights stay pruned."

    def data_need(self) -> DataNeed:
        return DataNeed.LABELS


class Train(TrainingSettings, BaseStep):
    """Train the model from fresh random weights: what its architecture reaches on this data without its history."""

    kind: Literal["train"]
    """The technique."""

    family: ClassVar[str] = "training"
    summary: ClassVar[str] = (
        "Trains the architecture from new random weights, e.g. a student or a from-scratch baseline."
    )

    def data_need(self) -> DataNeed:
        return DataNeed.LABELS
