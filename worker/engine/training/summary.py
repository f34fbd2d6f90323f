"""What the training techniques say before and after a run: which layers can be trained, and what training did."""

from app.recipes.facts import Capability
from app.recipes.training import TrainingSettings
from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import Trained
from worker.engine.training.quality import is_better

LARGEST_WAITING_SHARE = 0.5
"""Of a parallel step's time, before a warning."""
Fact = float | int | str | bool | None


def find_trainable(kind: str, program: Program) -> Capability:
    """Name the layers with trainable weights, as the capability of a technique that trains."""
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
    return Capability(kind=kind, applicable=bool(owners), layers=tuple(owners), missing=missing)


def list_facts(trained: Trained, settings: TrainingSettings) -> dict[str, Fact]:
    """Return what a run did as a step's facts."""
    before, after = trained.quality_before, trained.quality_after
    return {
        "epochs_run": trained.epochs_run,
        "steps_run": trained.steps_run,
        "best_epoch": trained.best_epoch,
        "stopped_early": trained.stopped_early,
        "quality_metric": before.metric,
        "quality_before": before.value,
        "quality_after": after.value,
        "first_loss": trained.first_loss,
        "last_loss": trained.last_loss,
        "training_examples": trained.num_training,
        "choosing_examples": before.num_examples if settings.keep_best else 0,
        **trained.parallel_facts,
    }


def find_warnings(what: str, trained: Trained, examples: BoundExamples, settings: TrainingSettings) -> list[str]:
    """Return plain sentences about what a run did not achieve; `what` names it, e.g. "Fine-tuning"."""
    before, after = trained.quality_before, trained.quality_after
    warnings = []
    if settings.keep_best and trained.best_epoch == 0:
        warnings.append(
            f"{what} found nothing better than its start ({before.metric} {before.value:.4g} on "
            f"{before.num_examples} examples set apart) in {trained.epochs_run} epochs, so the start was kept."
        )
    elif not settings.keep_best and is_better(before, after):
        warnings.append(
            f"{what} ended worse than it began ({before.metric} {before.value:.4g} -> {after.value:.4g}), "
            "and keep_best is off."
        )
    fixed = examples.fixed_batch
    if fixed is not None and fixed != settings.batch_size:
        warnings.append(
            f"The model was exported with a fixed batch, so it was trained with {fixed} examples a step "
            f"instead of {settings.batch_size}."
        )
    if fixed is not None and settings.accumulate > 1:
        warnings.append(f"accumulate was not used: the model takes exactly {fixed} examples, no fewer at a time.")
    return [*warnings, *warn_about_plan(trained)]


def warn_about_plan(trained: Trained) -> list[str]:
    """Say where processes spent more time waiting for each other than computing."""
    share = trained.parallel_facts.get("communication_share")
    if not isinstance(share, float) or share <= LARGEST_WAITING_SHARE:
        return []
    return [
        f"The ranks of plan {trained.parallel_facts['parallel']!r} waited for each other {share:.0%} of the time: "
        "fewer processes, or more work for each (a larger batch_size), would use the machine better."
    ]
