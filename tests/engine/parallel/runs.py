"""Training the same model alone and under a plan."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from app.recipes.parallel import Parallel
from app.recipes.recipe import KINDS
from app.recipes.training import Finetune, TrainingSettings
from tests.engine.simulated_device import DEVICE, simulated_device
from tests.engine.techniques.learning import context
from worker.engine.devices import CPU
from worker.engine.errors import EngineFailure, RecipeRefused
from worker.engine.parallel import work
from worker.engine.parallel.choose import choose_strategy
from worker.engine.parallel.group import RankFinished, joined
from worker.engine.parallel.launch import run_parallel
from worker.engine.parallel.work import say_nothing
from worker.engine.programs.program import Program
from worker.engine.techniques import finetune
from worker.engine.techniques.base import Outcome
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training.examples import BoundExamples

T = TypeVar("T")


def without_dropout(program: Program) -> Program:
    """Dropout draws other numbers on every rank, so it is left out where results are compared."""
    for layer in program.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, nn.RNNBase):
            layer.dropout = 0.0
    return program


def run(program: Program, examples: BoundExamples, directory: Path, kind: str = "finetune", **spec: Any) -> Outcome:
    """Run a step on as many processes as its plan says."""
    return run_and_follow(program, examples, directory, kind, **spec)[0]


def run_and_follow(
    program: Program,
    examples: BoundExamples,
    directory: Path,
    kind: str = "finetune",
    teacher: Program | None = None,
    device: torch.device = CPU,
    **spec: Any,
) -> tuple[Outcome, list[float]]:
    """Run a step on as many processes as its plan says; return the losses that it reported too."""
    step = KINDS[kind].model_validate({"kind": kind, **spec})
    assert isinstance(step, TrainingSettings)
    directory.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    where = replace(
        context(examples), directory=directory, open_original=teacher and teacher.copy,
        report=lambda *_, **metrics: losses.append(metrics["loss"]),
    )  # fmt: skip
    technique: ModuleType = TECHNIQUES[kind]
    torch.manual_seed(0)
    if step.parallel is None:
        return technique.run(program, step, where), losses
    program.device = device
    return run_forked(
        step.parallel, directory / "meeting", lambda: (technique.run(program, step, where), losses), device
    )


def find_refusal(program: Program, examples: BoundExamples, directory: Path, **spec: Any) -> str:
    """Return the code with which all ranks of a plan refuse to fine-tune; "nothing" where they would."""
    step, copy = Finetune.model_validate({"kind": "finetune", **spec}), program.copy()
    assert step.parallel is not None

    def refuse() -> str:
        try:
            choose_strategy(step, copy, copy.module, examples, [])
        except RecipeRefused as refusal:
            return refusal.code
        return "nothing"

    return run_forked(step.parallel, directory / "meeting", refuse)


def run_started(
    program: Program, examples: BoundExamples, directory: Path, report: Callable[..., None] = say_nothing, **spec: Any
) -> EngineFailure | None:
    """Fine-tune as the engine does, with rank 0 in a child of this process; return why it failed."""
    step = Finetune.model_validate({"kind": "finetune", **spec})
    plan = step.parallel
    assert plan is not None
    directory.mkdir(parents=True, exist_ok=True)
    where = replace(context(examples), directory=directory, report=report)

    def act() -> None:
        try:
            run_parallel("finetune", finetune.run, program, step, plan, where)
        except EngineFailure as failure:
            outcome.write_text(json.dumps([failure.detail, failure.code, failure.retryable]))
        else:
            outcome.write_text("null")
        assert not dist.is_initialized()

    outcome = directory / "outcome"
    _, status = os.waitpid(_fork(act), 0)
    assert status == 0
    found = json.loads(outcome.read_text())
    if found is None:
        return None
    detail, code, retryable = found
    failure = EngineFailure(detail, code=code)
    failure.retryable = retryable
    return failure


def run_forked(plan: Parallel, meeting_point: Path, act: Callable[[], T], device: torch.device = CPU) -> T:
    """Return what rank 0 returns. All ranks are forked, which spares them the imports; this process is none of them,
    because one in which gloo has run must not be forked again."""
    result = meeting_point.with_suffix(".result")
    children = [_fork_rank(plan, rank, meeting_point, act, result, device) for rank in range(plan.num_ranks)]
    try:
        statuses = [os.waitpid(child, 0)[1] for child in children]
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    assert statuses == [0] * len(children)
    found: T = torch.load(result, weights_only=False)
    return found


def run_to_its_end(act: Callable[[], T], result: Path) -> T:
    """Return what a child of this process returns."""
    _, status = os.waitpid(_fork(lambda: torch.save(act(), result, pickle_module=work)), 0)
    assert status == 0
    found: T = torch.load(result, weights_only=False)
    return found


def _fork_rank(
    plan: Parallel, rank: int, meeting_point: Path, act: Callable[[], object], result: Path, device: torch.device
) -> int:
    def be_rank() -> None:
        with suppress(RankFinished):
            elsewhere = nullcontext() if device == CPU else simulated_device()
            if device == DEVICE:
                _show_to_fsdp()
            with joined(plan, rank, meeting_point, 1, device), elsewhere:
                value = act()
            if rank == 0:
                torch.save(value, result, pickle_module=work)

    return _fork(be_rank)


def _show_to_fsdp() -> None:
    """Let FSDP2 take the simulated device for one with streams, and its tensors for what they are, in this process."""
    for name, part in list(sys.modules.items()):
        if name.startswith("torch.distributed.fsdp._fully_shard.") and hasattr(part, "_get_device_handle"):
            vars(part)["_get_device_handle"] = lambda _: torch.cpu
    vars(_fully_shard)["_get_device_from_mesh"] = lambda _: DEVICE
    # It takes all meta tensors for empty ones.
    FSDPParamGroup._validate_no_meta_params = lambda _: None  # type: ignore[method-assign]


def _fork(act: Callable[[], None]) -> int:
    """Return the child that does it."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        act()
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
