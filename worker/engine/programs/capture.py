"""From a program's module back to a torch.export program, with the same sizes fixed and variable as before."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import Dim, ExportedProgram

from worker.engine.errors import ExportFailed
from worker.engine.programs.example_inputs import evaluate_size
from worker.engine.programs.program import Program


def capture(program: Program) -> ExportedProgram:
    """Return the program in eval mode as torch.export sees it."""
    inputs = program.example_inputs(tracing_batch_size(program))
    with evaluating(program), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(program.module, inputs, dynamic_shapes=_dynamic_shapes(program))
        except Exception as error:
            raise ExportFailed(f"torch.export failed on the result: {error}", code="capture_failed") from error
    _check_sizes(program, exported)
    return exported


def tracing_batch_size(program: Program) -> int:
    """Return the batch that the program is exported at: the fixed one, or any allowed one above 1."""
    signature = program.signature
    if signature.batch_size is not None:
        return signature.batch_size
    low, high = signature.dynamic_ranges.get("batch", (1, None))
    size = max(2, low, signature.example_sizes.get("batch", 2))
    return size if high is None else min(size, high)


@contextmanager
def evaluating(program: Program) -> Iterator[None]:
    """Switch the module to eval mode, and back to what it was."""
    training = [module for module in program.module.modules() if module.training]
    program.module.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _dynamic_shapes(program: Program) -> tuple[dict[int, object], ...]:
    ranges = program.signature.dynamic_ranges
    dims = {word: Dim(word, min=low, max=high) for word, (low, high) in ranges.items()}
    return tuple(
        {axis: evaluate_size(size, dims) for axis, size in enumerate(facts.shape) if isinstance(size, str)}
        for facts in program.signature.inputs
    )


def _check_sizes(program: Program, exported: ExportedProgram) -> None:
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    for name, facts in zip(exported.graph_signature.user_inputs, program.signature.inputs, strict=True):
        for axis, size in enumerate(facts.shape):
            found = values[str(name)].shape[axis]
            if isinstance(size, str) and isinstance(found, int):
                raise ExportFailed(
                    f"The size {size} (axis {axis} of input {facts.name}) became fixed at {found} in the result.",
                    code="size_became_fixed",
                )
