"""Fine-tune the program as it now is on labelled data."""

from typing import cast

from app.recipes.facts import Capability
from app.recipes.training import Finetune
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import train
from worker.engine.training.summary import find_trainable, find_warnings, list_facts


def inspect(program: Program) -> Capability:
    """Name the layers with trainable weights."""
    return find_trainable("finetune", program)


def run(program: Program, step: Finetune, context: Context) -> Outcome:
    """Train in place; pruned weights stay pruned."""
    examples = cast(BoundExamples, context.examples)
    trained = train(program, examples, step, seed=context.seed, report=context.report, checkpoints=context.checkpoints)
    return Outcome(
        program=program,
        facts=list_facts(trained, step),
        warnings=tuple(find_warnings("Fine-tuning", trained, examples, step)),
    )
