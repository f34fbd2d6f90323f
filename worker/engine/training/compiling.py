"""Compiling what is trained, where the worker can: torch.compile with its own compilers for the CPU and for GPUs."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from worker.engine.compilers import check_compiler

OPTIONS: dict[str, Any] = {
    "compile_threads": 1,  # no helper processes, which would outlive their use inside the sandbox
    "fallback_random": True,  # dropout draws the numbers that it draws without being compiled
}


def compile_module(module: nn.Module, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """Return the module as a compiled function; it is compiled when it is called first, in training mode.

    The module itself stays as it is: its state dict, its hooks and whoever evaluates it know nothing of this.
    Raises CompilerMissing.
    """
    check_compiler(device, "compile is true", "set compile to false: the weights are the same up to rounding")
    # Steps have two sizes of batches at most: the second makes torch compile once more, with that size variable.
    return cast(Callable[..., tuple[Tensor, ...]], torch.compile(module, options=OPTIONS))
