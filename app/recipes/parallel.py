"""How a training step is spread over several processes."""

from math import prod
from typing import Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import Spec

MAX_RANKS = 64


class Parallel(Spec):
    """A mesh of processes (ranks): data x tensor x pipeline. Each rank has a device of its own, on CPUs threads."""

    data: int = Field(1, ge=1, le=MAX_RANKS)
    """Replicas of the model that each take a share of every batch and sum their gradients (DDP)."""
    shard: bool = False
    """Replicas keep only a share of the parameters, gradients and optimizer state, and gather each layer's parameters
    when they are needed (FSDP2, ZeRO stage 3): less memory, more communication."""
    tensor: int = Field(1, ge=1, le=MAX_RANKS)
    """Ranks among which attention heads and the hidden channels of feed-forward layers are split (Shoeybi et al.
    2019)."""
    pipeline: int = Field(1, ge=1, le=MAX_RANKS)
    """Stages: consecutive parts of the model of about equal cost, one rank each."""
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """Pipeline only. GPipe: all micro-batches forward, then all backward (Huang et al. 2019). 1F1B: one forward, one
    backward, so that a stage holds the activations of at most `pipeline` micro-batches (Narayanan et al. 2019)."""
    num_microbatches: int | None = Field(None, ge=1, le=1024)
    """Pipeline only: parts of each replica's batch that follow each other; null: twice the stages."""
    devices: int | None = Field(None, ge=1, le=MAX_RANKS)
    """Ranks to start; null: as many as the mesh has. Given, it must be the mesh's product."""
    threads_per_rank: int | None = Field(None, ge=1, le=256)
    """CPU threads of each rank; null: an equal share of the job's."""
    timeout_seconds: float = Field(120.0, ge=1, le=3600)
    """How long a rank waits for another before the step fails with rank_stuck, which a retry may cure."""

    @property
    def num_ranks(self) -> int:
        """Return the number of processes."""
        return prod(self.axes.values())

    @property
    def axes(self) -> dict[str, int]:
        """Return the mesh: the name of each axis and its size, the slowest-varying first."""
        return {"pipeline": self.pipeline, "data": self.data, "tensor": self.tensor}

    @property
    def microbatches(self) -> int:
        """Return the number of micro-batches of a replica's batch."""
        return 1 if self.pipeline == 1 else self.num_microbatches or 2 * self.pipeline

    def describe(self) -> str:
        """Return the mesh as text, e.g. "data 2 x tensor 2"."""
        named = {name: self.axes[name] for name in ("data", "tensor", "pipeline")}
        return " x ".join(f"{name} {size}" for name, size in named.items() if size > 1) or "data 1"

    @model_validator(mode="after")
    def _check_mesh(self) -> Self:
        if self.devices is not None and self.devices != self.num_ranks:
            raise ValueError(f"{self.describe()} != {self.devices} devices")
        if self.num_ranks > MAX_RANKS:
            raise ValueError(f"{self.describe()} = {self.num_ranks} ranks; at most {MAX_RANKS}")
        if self.shard and self.data == 1:
            raise ValueError("shard divides the parameters among replicas, so data must be at least 2")
        if self.shard and (self.tensor > 1 or self.pipeline > 1):
            raise ValueError(f"shard goes with data alone, not with {self.describe()}")
        if self.tensor > 1 and self.pipeline > 1:
            raise ValueError(f"{self.describe()}: tensor and pipeline each go with data, not with each other")
        if self.pipeline == 1 and (self.schedule == "gpipe" or self.num_microbatches is not None):
            raise ValueError("schedule and num_microbatches are for pipelines, and pipeline is 1")
        return self
