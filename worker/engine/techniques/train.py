"""Train the program's architecture from fresh random weights."""

from typing import cast

from app.recipes.facts import Capability
from app.recipes.training import Train
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.fresh import reset_weights
from worker.engine.training.loop import train
from worker.engine.training.summary import find_trainable, find_warnings, list_facts


def inspect(program: Program) -> Capability:
    """Name the layers with trainable weights."""
    return find_trainable("train", program)


def run(program: Program, step: Train, context: Context) -> Outcome:
    """Forget the weights, keep the zero pattern of earlier pruning, and train in place."""
    examples = cast(BoundExamples, context.examples)
    fresh = reset_weights(program, context.seed)
    trained = train(program, examples, step, seed=context.seed, report=context.report, checkpoints=context.checkpoints)
    warnings = find_warnings("Training from new weights", trained, examples, step)
    if fresh.guessed:
        warnings.append(
            "No layer says how these parameters start, so they began from usual values for their shape and name: "
            f"{_list(fresh.guessed)}."
        )
    if fresh.kept:
        warnings.append(f"These parameters kept their values, nothing tells how they start: {_list(fresh.kept)}.")
    return Outcome(
        program=program,
        facts={
            **list_facts(trained, step),
            "parameters_reset": len(fresh.by_layer) + len(fresh.guessed),
            "parameters_kept": len(fresh.kept),
        },
        warnings=tuple(warnings),
    )


def _list(names: list[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
