"""Training the same model alone and under a plan."""

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from app.recipes.parallel import Parallel
from app.recipes.recipe import KINDS
from app.recipes.training import TrainingSettings
from tests.engine.techniques.learning import context
from worker.engine.parallel import work
from worker.engine.parallel.group import RankFinished, joined
from worker.engine.parallel.launch import run_parallel
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Outcome
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training.examples import BoundExamples

T = TypeVar("T")


def without_dropout(program: Program) -> Program:
    """Dropout draws other numbers on every rank, so it is left out where results are compared."""
    for layer in program.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return program


def run(
    program: Program,
    examples: BoundExamples,
    directory: Path,
    kind: str = "finetune",
    teacher: Program | None = None,
    *,
    started: bool = False,
    **spec: Any,
) -> Outcome:
    """Run a step on as many processes as its plan says; `started` as the engine starts them, with this as rank 0."""
    step = KINDS[kind].model_validate({"kind": kind, **spec})
    assert isinstance(step, TrainingSettings)
    directory.mkdir(parents=True, exist_ok=True)
    where = replace(context(examples), directory=directory, open_original=teacher and teacher.copy)
    technique: ModuleType = TECHNIQUES[kind]
    torch.manual_seed(0)
    if step.parallel is None:
        return technique.run(program, step, where)
    if started:
        return run_parallel(kind, technique.run, program, step, step.parallel, where)
    return run_forked(step.parallel, directory / "meeting", lambda: technique.run(program, step, where))


def run_forked(plan: Parallel, meeting_point: Path, act: Callable[[], T]) -> T:
    """Return what rank 0 returns. All ranks are forked, which spares them the imports; this process is none of them,
    because one in which gloo has run must not be forked again."""
    result = meeting_point.with_suffix(".result")
    children = [_fork_rank(plan, rank, meeting_point, act, result) for rank in range(plan.num_ranks)]
    try:
        statuses = [os.waitpid(child, 0)[1] for child in children]
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    assert statuses == [0] * len(children)
    found: T = torch.load(result, weights_only=False)
    return found


def _fork_rank(plan: Parallel, rank: int, meeting_point: Path, act: Callable[[], object], result: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with joined(plan, rank, meeting_point, 1):
            value = act()
        if rank == 0:
            torch.save(value, result, pickle_module=work)
        status = 0
    except RankFinished:
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def difference(one: Program, other: Program) -> float:
    """Return the largest difference between two programs' parameters and buffers, relative to the tensor's size."""
    first, second = one.module.state_dict(), other.module.state_dict()
    assert list(first) == list(second)
    return max(_difference(first[name], second[name]) for name in first)


def _difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    one, other = one.double(), other.double()
    return float((one - other).norm() / one.norm().clamp(min=1e-6))
