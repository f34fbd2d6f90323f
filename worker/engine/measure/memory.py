"""Peak memory of a model: resident growth of a fresh process that loads it and runs it once."""

import json
import subprocess
import sys
from pathlib import Path

from worker.engine.arrays import write_npz
from worker.engine.errors import EngineFailure
from worker.engine.measure import memory_child
from worker.engine.measure.runtimes import Arrays, Runtime
from worker.engine.programs.program import Signature


def measure_peak_memory(
    path: Path, runtime: Runtime, signature: Signature, inputs: Arrays, num_threads: int, directory: Path
) -> int:
    """Return the peak growth in bytes over the bare runtime. Interpreter and runtime themselves are not counted."""
    inputs_path = directory / "memory_inputs.npz"
    names = [each.name for each in signature.inputs]
    write_npz(inputs_path, dict(zip(names, inputs, strict=True)))
    child = subprocess.run(
        [sys.executable, "-I", memory_child.__file__, runtime, str(path), str(inputs_path), str(num_threads)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    if child.returncode != 0:
        raise EngineFailure(
            f"the process that measures memory ended with {child.returncode} while running {path.name}",
            code="measurement_failed",
            fix="Give the worker more memory, or use a smaller target.batch_size.",
        )
    return int(json.loads(child.stdout)["bytes"])
