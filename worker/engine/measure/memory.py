"""Peak memory of a model: growth of a fresh process that loads it and runs it once, on the host and on a GPU."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from app.recipes.base import Runtime
from worker.engine.arrays import write_npz
from worker.engine.devices import CPU, release_unused
from worker.engine.errors import EngineFailure
from worker.engine.measure import memory_child
from worker.engine.measure.runtimes import Arrays
from worker.engine.programs.program import Signature


@dataclass(frozen=True)
class PeakMemory:
    """Of one call, loading included."""

    host_bytes: int
    """Peak resident growth over the bare runtime. Interpreter and runtime themselves are not counted."""
    device_bytes: int | None
    """Peak of what torch's allocator had given out on the GPU; None on the CPU."""


def measure_peak_memory(
    path: Path,
    runtime: Runtime,
    signature: Signature,
    inputs: Arrays,
    num_threads: int,
    directory: Path,
    device: torch.device = CPU,
) -> PeakMemory:
    """Measure a model file in a process of its own. Raises EngineFailure where that process ends badly."""
    inputs_path = directory / "memory_inputs.npz"
    names = [each.name for each in signature.inputs]
    write_npz(inputs_path, dict(zip(names, inputs, strict=True)))
    release_unused(device)
    child = subprocess.run(
        [
            sys.executable, "-I", memory_child.__file__, runtime, str(path), str(inputs_path), str(num_threads),
            str(device),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    if child.returncode != 0:
        raise EngineFailure(
            f"the process that measures memory ended with {child.returncode} while running {path.name}",
            code="measurement_failed",
            fix="Give the worker more memory, or use a smaller target.batch_size.",
        )
    answer = json.loads(child.stdout)
    return PeakMemory(answer["host_bytes"], answer["device_bytes"])
