"""Numbers that a program stores: all of them, and those that are not zero."""

from dataclasses import dataclass

import torch

from worker.engine.programs.program import OnnxProgram, Program


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a program stores. A zero is stored like any other number."""

    total: int
    nonzero: int


def count_parameters(program: Program | OnnxProgram) -> ParameterCount:
    """Count the parameters; a tensor shared by several layers counts once."""
    if isinstance(program, OnnxProgram):
        return ParameterCount(program.parameters, program.nonzero_parameters)
    parameters = list(program.module.parameters())
    return ParameterCount(
        sum(each.numel() for each in parameters), sum(int(torch.count_nonzero(each)) for each in parameters)
    )


def count_nonzero_by_layer(program: Program) -> dict[str, int]:
    """Return, for each layer with parameters of its own, how many of them are not zero."""
    return {
        name: sum(int(torch.count_nonzero(each)) for each in layer.parameters(recurse=False))
        for name, layer in program.module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    }
