"""The device that a job's heavy work runs on: choosing it, preparing it, moving to it, and what it is.

CUDA_VISIBLE_DEVICES, which the worker sets, says what this process can see; a job uses the first device of those, and
each rank of a parallel plan one.
Data and programs rest on the CPU; what computes on the device moves them there for a while (programs/placement.py).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.recipes.metrics import DeviceFacts
from app.recipes.recipe import Device
from worker.engine.errors import EngineFailure

CPU = torch.device("cpu")
MEMORY_SHARE = 0.95
"""Of the device's memory for one job: beyond it torch reports out of memory, before the driver or a display fails."""
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


class DeviceMissing(EngineFailure):
    """The recipe asks for a device that this worker does not have."""

    code = "device_missing"
    fix = "Send the job to a worker with a GPU (docs/gpu.md), or set recipe.target.device to 'cpu'."
    retryable = True


def choose_device(wanted: Device) -> torch.device:
    """Return the device for a job whose target is `wanted`: CUDA where this process sees one, else the CPU.

    A job that is measured on the CPU trains and calibrates on the GPU all the same. Raises DeviceMissing.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if wanted == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "is not set" if visible is None else f"is {visible!r}"
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise DeviceMissing(
            f"recipe.target.device is 'cuda', and torch {torch.__version__} ({build}) sees no device; "
            f"CUDA_VISIBLE_DEVICES {limit}"
        )
    return CPU


def place_ranks(device: torch.device, num_ranks: int) -> list[torch.device]:
    """Return the device of every rank of a parallel plan: on GPUs each its own, in the order of CUDA_VISIBLE_DEVICES;
    else all the same. Raises DeviceMissing where there are fewer GPUs than ranks."""
    if device.type != "cuda":
        return [device] * num_ranks
    if torch.cuda.device_count() < num_ranks:
        raise DeviceMissing(
            f"the parallel plan has {num_ranks} ranks, each on a GPU of its own, and this engine sees "
            f"{torch.cuda.device_count()}"
        )
    return [torch.device("cuda", rank) for rank in range(num_ranks)]


def prepare_device(device: torch.device) -> None:
    """Make work on the device repeatable and bounded: exact 32-bit products, fixed algorithms, limited memory.

    TF32 is off so that numbers are those of the CPU; training steps that want speed ask for `precision`. An operator
    for which CUDA has no deterministic algorithm warns in the job's log instead of ending the job.
    """
    if device.type != "cuda":
        return
    # Read when cuBLAS is first used; torch refuses deterministic products without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    _allow_tf32(False)
    backends: Any = torch.backends
    backends.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = False
    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, device)


def finish_work(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_unused(device: torch.device) -> None:
    """Give back to a GPU what torch keeps of it for later, so that another process can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's tensors are; the CPU for one that has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), CPU)


def move(tensors: Iterable[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors on the device, themselves where they are there already."""
    return tuple(each.to(device) for each in tensors)


def copies_from_pinned_memory(device: torch.device) -> bool:
    """Whether a copy to the device runs while the host goes on, if it starts in page-locked memory."""
    return device.type == "cuda"


def pin_batch(
    batch: tuple[tuple[Tensor, ...], Tensor | None], device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return (inputs, labels) from where a copy to the device does not keep the host; takes a copy on the host."""
    if not copies_from_pinned_memory(device):
        return batch
    inputs, labels = batch
    return tuple(each.pin_memory() for each in inputs), None if labels is None else labels.pin_memory()


def move_batch(
    batch: tuple[tuple[Tensor, ...], Tensor | None], device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return (inputs, labels) on the device. From pinned memory they are copied while the host goes on."""
    if device.type == "cpu":
        return batch
    inputs, labels = batch
    pinned = copies_from_pinned_memory(device)

    def send(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=pinned)

    return tuple(map(send, inputs)), None if labels is None else send(labels)


@contextmanager
def fast_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Within it, a GPU multiplies float32 matrices with 10 bits of mantissa where `tf32` says so, else as it is set.

    TF32 is NVIDIA's format of the tensor cores since compute capability 8.0; sums stay float32.
    """
    if not tf32:
        yield
        return
    assert device.type == "cuda", "no other device multiplies in TF32"
    _allow_tf32(True)
    try:
        yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed: bool) -> None:
    """Say it by the older of torch's two settings, which sets the newer one too. Said by the newer alone, the parts of
    torch that read the older one raise, the compiler among them (torch 2.13)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def mixed_precision(device: torch.device, *, bf16: bool) -> AbstractContextManager[object]:
    """Return the context in which a forward pass computes products in bfloat16, or as usual."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def describe_device(device: torch.device) -> DeviceFacts | None:
    """Return what a GPU is; None for the CPU."""
    if device.type != "cuda":
        return None
    facts: Any = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        name=facts.name,
        memory_bytes=facts.total_memory,
        compute_capability=f"{facts.major}.{facts.minor}",
        cuda_version=str(torch.version.cuda),
        driver=read_driver_version(DRIVER_VERSION),
    )


def read_driver_version(path: Path) -> str | None:
    """Return the version in the first line of the NVIDIA driver's version file, None where there is no such file."""
    try:
        words = path.read_text(encoding="ascii", errors="replace").split("\n", 1)[0].split()
    except OSError:
        return None
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
    return next((word for word in words if word[:1].isdigit() and word.replace(".", "").isdigit()), None)
