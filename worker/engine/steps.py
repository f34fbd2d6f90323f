"""Running the steps of a recipe, one after the other, and counting what each left behind."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.recipes.metrics import StepMetrics
from app.recipes.recipe import Recipe, Step
from app.recipes.training import TrainingSettings
from worker.engine.checkpoints.keeper import Checkpoints
from worker.engine.checkpoints.state import Checkpoint, Record
from worker.engine.environment import seed_everything
from worker.engine.measure.macs import count_macs
from worker.engine.measure.size import count_packed_bytes, count_parameters
from worker.engine.parallel.launch import run_parallel
from worker.engine.programs.program import FileProgram, Program
from worker.engine.progress import Reporter, Stage
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training.examples import BoundExamples

STEP_WEIGHTS = {
    "train": 12.0, "finetune": 12.0, "distill": 15.0, "quantize_aware_training": 20.0,
    "derive_student": 5.0, "prune_structured": 5.0, "factorize_low_rank": 3.0, "prune_wanda": 2.0, "prune_n_m": 2.0,
    "share_weights": 3.0, "quantize_mixed": 8.0, "quantize_int4": 4.0, "quantize_int8": 5.0,
}  # fmt: skip
"""Guessed seconds, on the scale of the pipeline's other stages; a kind that is not here counts 1."""


@dataclass
class Made:
    """What the steps have made so far."""

    program: Program | FileProgram
    module: Program
    """The last trainable form: `program` itself, or what it was made from when it is a file."""
    record: Record = field(default_factory=Record)


def expect_steps(recipe: Recipe) -> list[Stage]:
    """Return the stages of the steps for the progress."""
    return [Stage(step.kind, STEP_WEIGHTS.get(step.kind, 1.0), index) for index, step in enumerate(recipe.steps)]


def run_steps(
    recipe: Recipe,
    program: Program,
    examples: BoundExamples | None,
    *,
    num_threads: int,
    directory: Path,
    reporter: Reporter,
    open_original: Callable[[], Program] | None = None,
    open_teacher: Callable[[str], Program] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Made:
    """Apply every step of the recipe to the program, in place; go on from a checkpoint where there is one."""
    resumed = checkpoints.find() if checkpoints is not None else None
    made = _restore(resumed, program, directory) if resumed is not None else Made(program, program)
    record = made.record
    for index, step in enumerate(recipe.steps):
        reporter.enter(step.kind)
        if resumed is not None and index < resumed.header.step:
            continue
        seed = derive_seed(recipe.seed, index)
        seed_everything(seed)
        scratch = directory / f"step_{index}"
        scratch.mkdir()
        inside = None
        if checkpoints is not None:
            here = resumed if resumed is not None and index == resumed.header.step else None
            inside = checkpoints.begin_step(index, step, made.module, record, here)
        context = Context(
            seed, num_threads, scratch, examples, reporter.report, index=index, target=recipe.target,
            open_original=open_original, open_teacher=open_teacher, checkpoints=inside, effects=record.effects,
        )  # fmt: skip
        started_at = time.perf_counter()
        outcome = _run(step, made.module, context)
        seconds = inside.seconds if inside is not None else time.perf_counter() - started_at
        made.program = outcome.program
        if isinstance(outcome.program, Program):
            made.module = outcome.program
        record.warnings += outcome.warnings
        record.sensitivity += outcome.sensitivity
        facts = {name: _plain(value) for name, value in outcome.facts.items()}
        record.steps.append(_count(index, step.kind, seconds, facts, made, packed="packed" in recipe.formats))
        for line in (*(f"{name} = {value}" for name, value in facts.items()), *outcome.warnings):
            reporter.note(f"  {line}")
        if checkpoints is not None:
            checkpoints.end_step(index, made.program, made.module, record)
    return made


def _restore(resumed: Checkpoint, original: Program, directory: Path) -> Made:
    module = resumed.restore_program(original)
    final = resumed.restore_final(module, directory)
    return Made(final or module, module, resumed.restore_record())


def _run(step: Step, program: Program, context: Context) -> Outcome:
    run: Callable[[Program, Any, Context], Outcome] = TECHNIQUES[step.kind].run
    plan = step.parallel if isinstance(step, TrainingSettings) else None
    if plan is None or plan.num_ranks == 1:
        return run(program, step, context)
    return run_parallel(step.kind, run, program, step, plan, context)


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of one step: different for each, and the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big") >> 1


def _count(
    index: int,
    kind: str,
    seconds: float,
    facts: dict[str, float | int | str | bool | None],
    made: Made,
    *,
    packed: bool,
) -> StepMetrics:
    parameters = count_parameters(made.program)
    return StepMetrics(
        index=index,
        kind=kind,
        seconds=seconds,
        facts=facts,
        parameters=parameters.total,
        nonzero_parameters=parameters.nonzero,
        macs=count_macs(made.module).total,
        packed_bytes=count_packed_bytes(made.program) if packed and isinstance(made.program, Program) else None,
    )


def _plain(value: float | int | str | bool | None) -> float | int | str | bool | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
