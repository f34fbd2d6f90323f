"""What a job asks of the worker that runs it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import Spec

DeviceKind = Literal["cpu", "gpu"]
DEVICE_KINDS: tuple[DeviceKind, ...] = ("cpu", "gpu")

MAX_MEMORY_BYTES = 2**50


class Needs(Spec):
    """What a worker must have so that it may run the job. What is left out follows from the recipe."""

    device: DeviceKind | None = None
    """The kind of worker. Null: a GPU where `num_devices` asks for some or a step trains in `tf32`, else what
    `recipe.target` is measured on."""
    num_devices: int | None = Field(None, ge=0, le=1024)
    """GPUs that the job has for itself, all in one worker. Null: on a GPU one for each rank of the recipe's largest
    parallel plan, 1 without a plan; none on a CPU."""
    memory_bytes: int | None = Field(None, ge=0, le=MAX_MEMORY_BYTES)
    """Main memory that the worker must have for one job. Null: whatever it has, but 1 GiB at least
    for each rank of a parallel plan; the ranks share out equally what it has."""
    num_threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads that the worker must have for one job. Null: those of all ranks of the recipe's largest parallel
    plan, 1 without one."""

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        if self.device == "cpu" and self.num_devices:
            raise ValueError(
                f"num_devices counts GPUs and a job on a CPU has none; leave out num_devices = {self.num_devices}, or "
                "set device to 'gpu'"
            )
        if self.device == "gpu" and self.num_devices == 0:
            raise ValueError("a job on a GPU needs one at least; set num_devices to 1, or device to 'cpu'")
        return self
