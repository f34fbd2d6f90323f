"""Compiling what is trained, where the worker can: torch.compile with its own compilers for the CPU and for GPUs."""

import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from worker.engine.errors import StepFailed

OPTIONS: dict[str, Any] = {
    "compile_threads": 1,  # no helper processes, which would outlive their use inside the sandbox
    "fallback_random": True,  # dropout draws the numbers that it draws without being compiled
}
C_COMPILERS = ("cc", "gcc", "clang")
"""For the launchers of Triton's kernels."""


class CompilerMissing(StepFailed):
    """This worker cannot compile."""

    code = "compiler_missing"
    retryable = True

    def __init__(self, what: str, missing: str) -> None:
        """`what`: the part of the worker that is missing, as it is installed."""
        super().__init__(
            f"compile is true, and {missing}",
            fix=f"Install {what} for the worker, or set compile to false: the weights are the same up to rounding.",
        )


def compile_module(module: nn.Module, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """Return the module as a compiled function; it is compiled when it is called first, in training mode.

    The module itself stays as it is: its state dict, its hooks and whoever evaluates it know nothing of this.
    Raises CompilerMissing.
    """
    check_compiler(device)
    # Steps have two sizes of batches at most: the second makes torch compile once more, with that size variable.
    return cast(Callable[..., tuple[Tensor, ...]], torch.compile(module, options=OPTIONS))


def check_compiler(device: torch.device) -> None:
    """Raise CompilerMissing where a model on the device could not be compiled."""
    if device.type == "cuda":
        if not has_triton():
            raise CompilerMissing(
                "torch's CUDA build, which has Triton,", "torch finds no Triton, which compiles for this GPU"
            )
        if not any(map(shutil.which, C_COMPILERS)):
            raise CompilerMissing("a C compiler (gcc)", f"Triton finds no C compiler ({', '.join(C_COMPILERS)})")
        return
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as failure:
        raise CompilerMissing("a C++ compiler (g++)", "this worker has no C++ compiler") from failure
