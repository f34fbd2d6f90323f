"""The machine and the versions that the numbers come from, and the settings that make runs repeatable."""

import os
import platform
import random
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.recipes.metrics import Environment
from app.recipes.plan import Plan
from app.recipes.recipe import Target
from worker.engine.devices import describe_device

PACKAGES = ("pare", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors")


def make_repeatable(num_threads: int, seed: int) -> None:
    """Fix threads, seeds and the choice of algorithms, so that the same work gives the same bytes."""
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Start every random generator that torch or a library may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def describe_environment(plan: Plan, device: torch.device) -> Environment:
    """Return where a job with this plan ran, its steps on `device`, and was measured."""
    assert plan.recipe is not None
    target = plan.recipe.target
    return Environment(
        processor=read_processor(),
        num_cores=_num_cores(),
        runtime=target.runtime,
        num_threads=target.num_threads,
        versions=versions(),
        isolation=plan.isolation,
        device=describe_device(device),
        target_device=target.device,
    )


def describe_machine(target: Target) -> dict[str, Any]:
    """Return what native code compiled here for a target needs of the machine that runs it.

    `instruction_sets` are all that this processor has, by torch's names: the compiler may use any of them.
    """
    capability = torch.cuda.get_device_capability() if target.device == "cuda" else None
    return {
        "torch": str(torch.__version__),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": target.device,
        "compute_capability": None if capability is None else ".".join(map(str, capability)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
        "num_threads": target.num_threads,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of what writes or runs artifacts."""
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    # It names its build too: 2.13.0+cpu and 2.13.0+cu130 compute with different libraries.
    return found | {"torch": str(torch.__version__)}


def read_processor() -> str:
    """Return the processor's name as the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
