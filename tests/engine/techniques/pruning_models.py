"""Programs to prune, opened once, and one call of the technique."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.recipes.pruning import PruneStructured
from app.recipes.recipe import Target
from tests.engine.zoo import export_model
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.prune_structured import run
from worker.engine.training.examples import BoundExamples

OPENED: dict[tuple[object, ...], Program] = {}
"""Exporting takes longer than pruning, so each model is exported once."""


def load(name: str, directory: Path, **options: Any) -> Program:
    """Return a fresh copy of a model of the zoo."""
    key = (name, *options.items())
    if key not in OPENED:
        export_model(name, directory / f"{name}.pt2", **options)
        (directory / "work").mkdir(exist_ok=True)
        OPENED[key] = open_program(directory / f"{name}.pt2", directory / "work")
    return OPENED[key].copy()


def load_module(module: nn.Module, inputs: tuple[Tensor, ...], directory: Path, *, dynamic: bool = True) -> Program:
    """Return a module of a test's own as an imported program."""
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
        torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes), directory / "module.pt2")
    (directory / "work").mkdir(exist_ok=True)
    return open_program(directory / "module.pt2", directory / "work")


def prune(
    program: Program,
    examples: BoundExamples | None = None,
    directory: Path = Path(),
    target: Target | None = None,
    **spec: Any,
) -> Outcome:
    """Run the technique; channel counts are rounded to 2 unless the test says otherwise."""
    context = Context(0, 1, directory, examples, lambda *_, **__: None, target=target or Target())
    return run(program, PruneStructured.model_validate({"kind": "prune_structured", "round_to": 2, **spec}), context)


def pruned(outcome: Outcome) -> Program:
    """Return the trainable program that the step left."""
    assert isinstance(outcome.program, Program)
    return outcome.program


def size(program: Program) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in program.module.parameters())
