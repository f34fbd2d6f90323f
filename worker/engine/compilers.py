"""What torch compiles models with: whether this worker has it, and the error that says that it has not."""

import shutil

import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from worker.engine.cuda_toolkit import PACKAGES, find_cuda_home
from worker.engine.errors import EngineFailure

C_COMPILERS = ("cc", "gcc", "clang")
"""For the launchers of Triton's kernels."""


class CompilerMissing(EngineFailure):
    """This worker cannot compile."""

    code = "compiler_missing"
    retryable = True

    def __init__(self, wish: str, missing: str, what: str, otherwise: str) -> None:
        """`what`: the part of the worker that is missing, as it is installed."""
        super().__init__(f"{wish}, and {missing}", fix=f"Install {what} for the worker, or {otherwise}.")


def check_compiler(device: torch.device, wish: str, otherwise: str) -> None:
    """Raise CompilerMissing where a model on the device could not be compiled.

    `wish`: what in the recipe asks for it; `otherwise`: what to change there where no worker has a compiler.
    """
    if device.type == "cuda":
        if not has_triton():
            missing = "torch finds no Triton, which compiles for this GPU"
            raise CompilerMissing(wish, missing, "torch's CUDA build, which has Triton,", otherwise)
        if not any(map(shutil.which, C_COMPILERS)):
            missing = f"Triton finds no C compiler ({', '.join(C_COMPILERS)})"
            raise CompilerMissing(wish, missing, "a C compiler (gcc)", otherwise)
        return
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as failure:
        raise CompilerMissing(wish, "this worker has no C++ compiler", "a C++ compiler (g++)", otherwise) from failure


def check_cuda_headers(wish: str, otherwise: str) -> None:
    """Raise CompilerMissing where C++ that calls CUDA could not be compiled."""
    if find_cuda_home() is None:
        what = f"a CUDA toolkit (/usr/local/cuda), or {PACKAGES} in the version of torch's CUDA {torch.version.cuda},"
        raise CompilerMissing(wish, "this worker has not all of CUDA's headers", what, otherwise)
