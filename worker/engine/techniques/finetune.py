"""Fine-tune the program as it now is on labelled data."""

from typing import cast

from app.recipes.facts import Capability
from app.recipes.training import Finetune
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import train
from worker.engine.training.quality import is_better


def inspect(program: Program) -> Capability:
    """Name the layers with trainable weights."""
    owners = {
        name.rpartition(".")[0]: None
        for name, parameter in program.module.named_parameters()
        if parameter.requires_grad
    }
    batch = program.signature.batch_size
    missing = None
    if not owners:
        missing = "the model has no trainable parameters"
    elif batch is not None:
        missing = (
            f"exported with a fixed batch: it is trained at exactly {batch} examples a step, whatever batch_size says"
        )
    return Capability(kind="finetune", applicable=bool(owners), layers=tuple(owners), missing=missing)


def run(program: Program, step: Finetune, context: Context) -> Outcome:
    """Train in place; pruned weights stay pruned."""
    examples = cast(BoundExamples, context.examples)
    trained = train(program, examples, step, seed=context.seed, report=context.report)
    before, after = trained.quality_before, trained.quality_after
    warnings = []
    if step.keep_best and trained.best_epoch == 0:
        warnings.append(
            f"Fine-tuning found nothing better than its start ({before.metric} {before.value:.4g} on "
            f"{before.num_examples} examples set apart) in {trained.epochs_run} epochs, so the start was kept."
        )
    elif not step.keep_best and is_better(before, after):
        warnings.append(
            f"Fine-tuning ended worse than it began ({before.metric} {before.value:.4g} -> {after.value:.4g}), "
            "and keep_best is off."
        )
    if examples.fixed_batch is not None and examples.fixed_batch != step.batch_size:
        warnings.append(
            f"The model was exported with a fixed batch, so it was trained with {examples.fixed_batch} examples a step "
            f"instead of {step.batch_size}."
        )
    return Outcome(
        program=program,
        facts={
            "epochs_run": trained.epochs_run,
            "steps_run": trained.steps_run,
            "best_epoch": trained.best_epoch,
            "quality_metric": before.metric,
            "quality_before": before.value,
            "quality_after": after.value,
            "first_loss": trained.first_loss,
            "last_loss": trained.last_loss,
            "training_examples": trained.num_training,
            "choosing_examples": before.num_examples if step.keep_best else 0,
        },
        warnings=tuple(warnings),
    )
