"""A run that was interrupted goes on from its checkpoint under the same plan, another one, or none."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes.parallel import Parallel
from app.recipes.plan import Plan, Progress
from app.recipes.training import Finetune
from tests.engine.folders import make_folder
from tests.engine.parallel.runs import difference, run_forked, run_to_its_end
from tests.engine.parallel.test_plans import open_cnn, open_gpt
from tests.engine.process import plan_of
from tests.engine.simulated_device import DEVICE
from tests.engine.techniques.learning import context
from worker.engine.checkpoints.keeper import Checkpoints, FollowedCheckpoints
from worker.engine.checkpoints.state import Record
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.devices import CPU
from worker.engine.parallel.group import current_group
from worker.engine.programs.program import Program
from worker.engine.progress import Reporter, Stage
from worker.engine.techniques import finetune

TOLERANCE = 1e-5
"""Of every tensor's norm: sums in another order. Under the same plan there is no difference at all, unless it is a
pipeline, which is cut by measured times."""
ALONE: dict[str, Any] = {}
STEPS: dict[str, dict[str, Any]] = {
    "gpt": {"epochs": 3, "batch_size": 24, "learning_rate": 0.02, "optimizer": "sgd", "gradient_clip_norm": 0.5},
    "cnn": {"epochs": 3, "max_steps": 14, "batch_size": 256, "learning_rate": 0.003, "optimizer": "adamw"},
}
NUM_WRITTEN = 6
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cnn", {"data": 2}, {"data": 2}),
    ("cnn", {"data": 2, "shard": True}, {"data": 2, "shard": True}),
    ("cnn", {"data": 2}, ALONE),
    ("cnn", ALONE, {"data": 3}),
    ("gpt", {"tensor": 2}, {"tensor": 2}),
    ("gpt", {"pipeline": 2}, {"pipeline": 2}),
    ("gpt", {"data": 2, "shard": True}, {"tensor": 2}),
    ("gpt", {"tensor": 2}, {"data": 2, "pipeline": 2, "num_microbatches": 2}),
    ("gpt", {"pipeline": 3}, {"data": 2, "shard": True}),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Interrupted(BaseException):
    """Stands for the end of a rank's process: nobody handles it, and the others lose it."""


def train(
    model: str,
    plan: dict[str, Any],
    directory: Path,
    *,
    interrupt_at: int | None = None,
    found: tuple[Path, ...] = (),
    device: torch.device = CPU,
) -> Program:
    """Fine-tune with a checkpoint after every step; the program is rank 0's."""
    start, examples = {"gpt": open_gpt, "cnn": open_cnn}[model]()
    step = Finetune.model_validate({"kind": "finetune", **STEPS[model], "parallel": plan or None})
    program = start.copy()
    program.device = device
    for name in ("in", "out", "tmp"):
        (directory / name).mkdir(parents=True)
    for path in found:
        (directory / "in" / path.name).write_bytes(path.read_bytes())
    job = work_of(step, tuple(path.name for path in found))

    def act() -> Program:
        keeper = Checkpoints(job, directory, reporter_of(directory, interrupt_at), StopRequest())
        resumed = keeper.find()
        inside: Any = keeper.begin_step(0, step, program, Record(), resumed)
        if plan and current_group().rank > 0:
            inside = FollowedCheckpoints(keeper.work, None if resumed is None else resumed.path)
        where = context(examples)
        where.checkpoints = inside
        torch.manual_seed(0)
        finetune.run(program, step, where)
        return program

    if not plan:
        return run_to_its_end(act, directory / "result")
    return run_forked(Parallel.model_validate(plan), directory / "meeting", act, device)


def work_of(step: Finetune, checkpoints: tuple[str, ...]) -> Plan:
    data = {"dataset_id": "dst_" + "a" * 26, "inputs": {"x": {"column": "x"}}, "task": "none"}
    recipe = {"steps": [step.model_dump()], "data": data | {"task": "classification", "label_column": "y"}}
    model = {"file": "m.pt2", "format": "pt2", "sha256": "0" * 64}
    return plan_of("optimize", model=model, recipe=recipe, checkpoint_seconds=0, checkpoints=checkpoints)


def reporter_of(directory: Path, interrupt_at: int | None) -> Reporter:
    count = 0

    def write(line: bytes) -> None:
        nonlocal count
        with (directory / "lines").open("ab") as file:
            file.write(line)
        count += Progress.model_validate_json(line).checkpoint is not None
        if count == interrupt_at:
            raise Interrupted

    reporter = Reporter(write)
    reporter.expect([Stage("finetune", 1.0, 0)])
    reporter.enter("finetune")
    return reporter


@cache
def whole(model: str, plan: str) -> Program:
    return train(model, json.loads(plan), make_folder() / "whole")


@cache
def interrupted(model: str, plan: str) -> tuple[Path, ...]:
    """Return the two checkpoints that are left of a run that ended in its middle, newest first."""
    directory = make_folder() / "interrupted"
    with pytest.raises(AssertionError):
        train(model, json.loads(plan), directory, interrupt_at=NUM_WRITTEN)
    return tuple(sorted((directory / "out" / "checkpoints").iterdir(), reverse=True))


def count_checkpoints(directory: Path) -> int:
    lines = (directory / "lines").read_bytes().splitlines()
    return sum(Progress.model_validate_json(line).checkpoint is not None for line in lines)


@pytest.mark.parametrize(("model", "before", "after"), CASES, ids=str)
def test_an_interrupted_run_goes_on(model: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    found = interrupted(model, json.dumps(before))
    resumed = train(model, after, tmp_path / "resumed", found=found)

    same = before == after and "pipeline" not in before
    expected = whole(model, json.dumps(before if same else ALONE))
    assert difference(expected, resumed) < (1e-12 if same else TOLERANCE)
    assert count_checkpoints(tmp_path / "resumed") < 14 - NUM_WRITTEN + 3
    for name, kept in resumed.masks.items():
        assert not resumed.module.get_parameter(name)[~kept].any()


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        ("cnn", {"data": 2, "shard": True}, {"data": 3}),
        pytest.param("gpt", {"data": 2, "tensor": 2}, {"pipeline": 2}, marks=pytest.mark.long),
        pytest.param("gpt", {"pipeline": 2}, {"data": 2, "shard": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_on_devices_goes_on_with_another_number_of_them(
    model: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        train(model, before, tmp_path / "interrupted", interrupt_at=NUM_WRITTEN, device=DEVICE)
    found = tuple(sorted((tmp_path / "interrupted" / "out" / "checkpoints").iterdir(), reverse=True))

    resumed = train(model, after, tmp_path / "resumed", found=found, device=DEVICE)

    assert difference(whole(model, json.dumps(ALONE)), resumed) < TOLERANCE
    assert count_checkpoints(tmp_path / "resumed") < 14 - NUM_WRITTEN + 3


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """Flip a bit of the header, which is where an engine can see it; the others the digest guards."""
    return data[:40] + bytes([data[40] ^ 0x01]) + data[41:]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_all_ranks_take_the_checkpoint_before_a_damaged_one(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    plan = {"data": 2}
    newest, before = interrupted("cnn", json.dumps(plan))
    damaged = tmp_path / newest.name
    damaged.write_bytes(damage(newest.read_bytes()))

    resumed = train("cnn", plan, tmp_path / "resumed", found=(damaged, before))

    told = [Progress.model_validate_json(line) for line in (tmp_path / "resumed" / "lines").read_bytes().splitlines()]
    assert [line.resumed for line in told if line.resumed] == [before.name] * 2, "each rank's own keeper found it"
    assert difference(whole("cnn", json.dumps(plan)), resumed) < 1e-12
