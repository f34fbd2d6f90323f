"""What the engine can do with a directory: one function for each action of a plan."""

from collections.abc import Callable
from pathlib import Path

from app.recipes.plan import Action, EngineResult, Plan
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.environment import make_repeatable
from worker.engine.pipeline import optimize
from worker.engine.programs.describe import describe
from worker.engine.programs.intake import open_program
from worker.engine.progress import Reporter, Stage
from worker.engine.techniques.registry import inspect_all
from worker.engine.training.datasets import check_dataset
from worker.engine.verify import verify


def run_action(plan: Plan, directory: Path, reporter: Reporter, stop: StopRequest | None = None) -> EngineResult:
    """Do what the plan asks; raises EngineFailure where that is refused or impossible. `stop` may end the process."""
    make_repeatable(plan.num_threads, plan.recipe.seed if plan.recipe else 0)
    if plan.action == "optimize":
        return optimize(plan, directory, reporter, stop or StopRequest())
    return ACTIONS[plan.action](plan, directory, reporter)


def _check_model(plan: Plan, directory: Path, reporter: Reporter) -> EngineResult:
    assert plan.model is not None
    reporter.expect([Stage("open_model", 3.0), Stage("inspect", 1.0)])
    reporter.enter("open_model")
    model = plan.model
    program = open_program(directory / "in" / model.file, directory / "tmp", model.format, model.architecture)
    reporter.enter("inspect")
    return EngineResult(model=describe(program, inspect_all(program)))


def _check_dataset(plan: Plan, directory: Path, reporter: Reporter) -> EngineResult:
    (dataset,) = plan.datasets
    reporter.expect([Stage("check_dataset", 1.0)])
    reporter.enter("check_dataset")
    return EngineResult(dataset=check_dataset(directory / "in" / dataset.file, dataset.format))


ACTIONS: dict[Action, Callable[[Plan, Path, Reporter], EngineResult]] = {
    "check_model": _check_model,
    "check_dataset": _check_dataset,
    "verify": verify,
}
