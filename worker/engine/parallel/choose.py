"""Which strategy a plan asks for, and whether it fits the model and the data."""

from collections.abc import Sequence

from torch import fx, nn

from app.recipes.parallel import Parallel
from app.recipes.training import TrainingSettings
from worker.engine.devices import move
from worker.engine.errors import RecipeRefused
from worker.engine.parallel.group import current_group
from worker.engine.parallel.pipeline import Pipeline
from worker.engine.parallel.replicas import Replicas
from worker.engine.parallel.sharded import Shards
from worker.engine.parallel.strategy import Alone, Strategy
from worker.engine.programs.program import Program
from worker.engine.training.compiling import compile_module
from worker.engine.training.examples import BoundExamples


def choose_strategy(
    settings: TrainingSettings,
    program: Program,
    module: nn.Module,
    examples: BoundExamples,
    extra: Sequence[nn.Parameter],
) -> Strategy:
    """Prepare a module for training under a plan.

    Raises RecipeRefused with code fixed_batch_not_divisible or too_few_examples, StepFailed with compiler_missing.
    """
    plan, batch_size = settings.parallel, settings.batch_size
    if plan is None or plan.num_ranks == 1:
        return Alone(module, compile_module(module, program.device) if settings.compile else module)
    _check_examples(plan, examples, batch_size)
    assert isinstance(module, fx.GraphModule), "what is trained is an imported graph"
    group = current_group()
    if plan.pipeline > 1:
        assert not extra, "distillation of features is refused with a pipeline"
        inputs, _ = next(iter(examples.training_batches(batch_size // (plan.data * plan.microbatches), seed=0)))
        return Pipeline(module, move(inputs, group.device), group)
    if plan.shard:
        return Shards(module, extra, group)
    if plan.tensor > 1:
        assert module is program.module, "simulated rounding is refused with a tensor axis"
        return Replicas(module, extra, group, program)
    return Replicas(module, extra, group)


def _check_examples(plan: Parallel, examples: BoundExamples, batch_size: int) -> None:
    parts, largest = plan.data * plan.microbatches, examples.limit_batch(batch_size)
    if parts > 1 and (examples.fixed_batch is not None or largest < parts):
        limit = "exactly" if examples.fixed_batch is not None else "at most"
        raise RecipeRefused(
            f"the model takes {limit} {largest} examples at a time, which {plan.describe()} cannot divide",
            code="fixed_batch_not_divisible",
            fix="Export the model with a dynamic batch without that limit, or leave parallel out.",
        )
    if examples.num_training < parts:
        raise RecipeRefused(
            f"{examples.num_training} training examples are fewer than the {parts} parts of a batch",
            code="too_few_examples",
            fix="Upload more rows, or use fewer ranks.",
        )
