"""Writing a program as an AOTInductor package: native code for machines like this one, which torch loads without Pare.

It is compiled from the .pt2 that Pare would write, so from a graph of torch's operators whose every name and text has
passed the gate for uploads; names reach the C++ text, and nothing else of an upload does (docs/security.md).
"""

import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves

from app.recipes.recipe import Target
from worker.engine.artifacts import choose_compiled_tolerance
from worker.engine.compilers import check_compiler, check_cuda_headers
from worker.engine.cuda_toolkit import cuda_toolkit
from worker.engine.devices import CPU, move
from worker.engine.errors import ExportFailed
from worker.engine.failures import is_out_of_memory
from worker.engine.load import largest_difference
from worker.engine.measure.runtimes import measured_on, open_model
from worker.engine.programs.capture import evaluating, tracing_batch_size
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.program import FileProgram, Program, Signature
from worker.engine.programs.rewrite import write_archive

OPTIONS: dict[str, Any] = {
    "compile_threads": 1,  # no helper processes, which would outlive their use inside the sandbox
    "aot_inductor.precompile_headers": False,  # pays from the fourth model on, and nothing is kept between jobs
    "aot_inductor.enable_line_tables": False,  # debugging information is most of a small package
    "aot_inductor.check_lowerbound": False,  # else batches of one are refused where inputs are checked
}
NO_MEMORY = ("out of memory allocating", "virtual memory exhausted", "Killed signal terminated program")
"""What g++ says where it had not enough."""
LEFT_OUT = (".cpp", ".data/serialization_id")
"""Ends of members that loading does not need: texts that name directories of this job, and a random number."""
CHECKED_BATCH = 7
"""Rows of the second batch at which a package is compared with its program; the first is the smallest allowed."""


def check_aoti(target: Target) -> None:
    """Raise CompilerMissing where this worker could not compile for the target."""
    wish = f"target.runtime is {target.runtime!r}" if target.runtime == "aotinductor" else "outputs.formats has 'aoti'"
    otherwise = "set target.runtime to 'torch' and leave 'aoti' out of outputs.formats"
    # For a GPU too: the code that launches its kernels is C++.
    device = measured_on(target)
    for each in dict.fromkeys((device, CPU)):
        check_compiler(each, wish, otherwise)
    if device != CPU:
        check_cuda_headers(wish, otherwise)


def export_aoti(program: Program | FileProgram, module: Program, path: Path, target: Target) -> float:
    """Write `path`, compiled for the target's device and so many threads. Return how long it took, in seconds.

    `module`: the program as a module, to make example inputs with. The package is run at two batches and compared with
    the program; raises ExportFailed where it cannot be compiled or gives other outputs.
    """
    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compile-") as name:
        directory = Path(name)
        source = directory / "source.pt2"
        if isinstance(program, FileProgram):
            source = program.path
        else:
            export_pt2(program, source)
        device = measured_on(target)
        exported = torch.export.load(source)
        if device != CPU:
            exported = move_to_device_pass(exported, device)
        # Pare's files hold no sample inputs, which is where the compiler learns the types and sizes from.
        exported.example_inputs = (move(module.example_inputs(tracing_batch_size(module)), device), {})
        with _compiling(target.num_threads), nullcontext() if device == CPU else cuda_toolkit():
            try:
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(directory / "raw.pt2"), inductor_configs=OPTIONS
                )
            except Exception as failure:  # whatever the compiler raises here means the same
                if is_out_of_memory(failure) or any(each in str(failure) for each in NO_MEMORY):
                    raise MemoryError(f"while compiling: {str(failure)[-500:]}") from failure
                traceback.print_exc()
                raise ExportFailed(
                    f"AOTInductor could not compile the model: {type(failure).__name__}: {str(failure)[:1000]}",
                    code="compilation_failed",
                    fix="Set target.runtime to 'torch', and leave 'aoti' out of outputs.formats.",
                ) from failure
        _repack(directory / "raw.pt2", path)
    seconds = time.perf_counter() - started_at
    _compare(exported.module(), path, module, target, integer=isinstance(program, FileProgram))
    return seconds


@contextmanager
def _compiling(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # it is written into the code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)


def _repack(raw: Path, path: Path) -> None:
    with zipfile.ZipFile(raw) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        kept = [short for short in members if not short.endswith(LEFT_OUT)]
        write_archive(path, [(short, archive.read(members[short])) for short in kept])


def _compare(original: Any, path: Path, module: Program, target: Target, *, integer: bool) -> None:
    names = [each.name for each in module.signature.outputs]
    device = measured_on(target)
    predict = open_model(path, "aotinductor", module.signature, target.num_threads, device)
    for size in _choose_batches(module.signature):
        inputs: tuple[Tensor, ...] = module.example_inputs(size)
        with torch.inference_mode():
            expected = [each.cpu().numpy() for each in tree_leaves(original(*move(inputs, device)))]
        floats = _run_floats(module, inputs) if integer else [None] * len(names)
        actual = predict(tuple(each.numpy() for each in inputs))
        for name, one, other, before in zip(names, expected, actual, floats, strict=True):
            difference, tolerance = largest_difference(one, other), choose_compiled_tolerance(one, before)
            if not difference <= tolerance:
                raise ExportFailed(
                    f"compiled by AOTInductor, output {name!r} differs by {difference:.6g} at batch {size}, and "
                    f"{tolerance:.6g} is allowed",
                    code="compiled_differs",
                    fix="Set target.runtime to 'torch', and leave 'aoti' out of outputs.formats.",
                )


def _run_floats(module: Program, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Return the outputs of a program's module as arrays."""
    with evaluating(module), torch.inference_mode():
        return [each.numpy() for each in module.module(*inputs)]


def _choose_batches(signature: Signature) -> tuple[int, ...]:
    if signature.batch_size is not None:
        return (signature.batch_size,)
    low, high = signature.dynamic_ranges.get("batch", (1, None))
    return tuple({low, max(low, CHECKED_BATCH if high is None else min(high, CHECKED_BATCH))})
