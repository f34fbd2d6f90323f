"""The seam between the pipeline and a technique.

A technique is one module named like its spec's kind, with two functions:

    inspect(program: Program) -> Capability                       which layers it can work on
    run(program, step, context: Context) -> Outcome               do it; may change `program` in place

It imports no other technique. It raises RecipeRefused or StepFailed with values in the message.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from app.recipes.metrics import LayerEffect
from app.recipes.recipe import Target
from worker.engine.programs.program import FileProgram, Program
from worker.engine.training.loop import Checkpoints


class Examples(Protocol):
    """Bound data: batches of model inputs with labels. `num_*` counts examples."""

    num_training: int
    num_evaluation: int

    @property
    def task(self) -> str:
        """What the labels mean."""

    def training_batches(
        self, batch_size: int, *, seed: int, drop_last: bool = False
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Yield (inputs, labels) over the shuffled training part, once."""

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Yield (inputs, labels) over the held-out part, in order."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the task's mean loss of one batch (differentiable)."""


@dataclass
class Context:
    """What a step may use besides the program."""

    seed: int
    """Of this step: derived from the recipe's seed and the step's index."""
    num_threads: int
    directory: Path
    """Scratch, private to the step."""
    examples: Examples | None
    report: Callable[..., None]
    """report(fraction, message="", **metrics): progress within the step, 0 to 1."""
    index: int = 0
    """Of the step in the recipe."""
    target: Target = field(default_factory=Target)
    """Where the result will run: what a step that measures latency measures on."""
    open_original: Callable[[], Program] | None = None
    """Returns a fresh copy of the job's model as it was uploaded, e.g. as a teacher."""
    open_teacher: Callable[[str], Program] | None = None
    """Returns another model that the recipe names, by its id."""
    checkpoints: Checkpoints | None = None
    """For the step's calls of `train`, so that they go on after a crash."""
    effects: dict[str, float] = field(default_factory=dict)
    """Sensitivities measured so far in this job, shared by its steps; the keys are `Sensitivity`'s."""


@dataclass
class Outcome:
    """What a step leaves behind."""

    program: Program | FileProgram
    facts: dict[str, float | int | str | bool | None] = field(default_factory=dict)
    """Named numbers for the step's metrics."""
    warnings: tuple[str, ...] = ()
    """Plain sentences for the verdict, e.g. that nothing got smaller."""
    sensitivity: tuple[LayerEffect, ...] = ()
    """What the step measured layer by layer."""
