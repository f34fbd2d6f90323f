"""Random models under random plans and settings: each ends where one process does, or is refused with a name.

`RANDOM_PLANS` says how many (default 30), `RANDOM_SEED` where their numbers begin.
"""

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _NormBase

from app.recipes.parallel import Parallel
from app.recipes.recipe import KINDS
from app.recipes.training import TrainingSettings
from tests.engine.parallel.runs import difference, run_forked, run_to_its_end, without_dropout
from tests.engine.parallel.test_oddities import MODELS, open_odd
from tests.engine.techniques.learning import bind, context, make_zoo
from tests.engine.zoo import ZOO
from worker.engine.errors import EngineFailure
from worker.engine.programs.program import Program
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training import loop
from worker.engine.training.examples import BoundExamples
from worker.engine.training.losses import IGNORED_LABEL

TOLERANCE = 2e-5
"""Of every tensor's norm, after a few steps: sums in another order; of biases and running means in relation to 1."""
LOOSE = 1e-3
"""Where twenty batch norms of a handful of examples each enlarge the rounding of the one before."""
FIRST, COUNT = int(os.environ.get("RANDOM_SEED", "0")), int(os.environ.get("RANDOM_PLANS", "30"))
PLANS: list[dict[str, Any]] = [
    {"data": 2}, {"data": 2, "shard": True}, {"data": 3}, {"data": 3, "shard": True}, {"tensor": 2},
    {"data": 2, "tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "schedule": "gpipe"},
    {"pipeline": 3, "num_microbatches": 2}, {"data": 2, "pipeline": 2, "num_microbatches": 2},
    {"pipeline": 2, "num_microbatches": 1}, {"data": 2, "pipeline": 2, "num_microbatches": 1},
]  # fmt: skip
REFUSALS = {"batch_norm_in_pipeline", "no_tensor_plan", "too_few_layers", "too_few_examples"}


@dataclass(frozen=True)
class Case:
    """What is trained, on what, and how."""

    model: str
    plan: dict[str, Any]
    spec: dict[str, Any]
    data: dict[str, Any]
    num_rows: int
    ignored: bool
    masked: tuple[str, ...]
    frozen: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What a run left, on rank 0."""

    program: Program
    reports: list[dict[str, float]]
    facts: dict[str, Any]


def open_model(name: str) -> Program:
    return without_dropout(make_zoo(name)) if name in ZOO else open_odd(name)[0].copy()


def draw(seed: int) -> Case:
    """Return the case of a number."""
    rng = random.Random(seed)
    model, plan = rng.choice([*ZOO, *MODELS]), dict(rng.choice(PLANS))
    program = open_model(model)
    shape = program.signature.outputs[0].shape
    task = rng.choice(["classification", "regression"] if len(shape) == 2 or model == "unet" else ["regression"])
    task = "language_modeling" if model == "gpt" else task
    spec: dict[str, Any] = {
        "kind": rng.choice(["finetune", "finetune", "train", "distill"]),
        "epochs": rng.choice([1, 2, 3]), "max_steps": rng.choice([2, 3, 4]),
        "batch_size": rng.choice([4, 7, 9, 12, 64]),
        "optimizer": "sgd", "learning_rate": 0.02, "schedule": rng.choice(["cosine", "linear", "step", "constant"]),
        "warmup_fraction": rng.choice([0, 0.3]), "weight_decay": rng.choice([0, 0.1]),
        "gradient_clip_norm": rng.choice([None, 0.1, 0.5]), "keep_best": rng.random() < 0.5,
    }  # fmt: skip
    if spec["keep_best"] and rng.random() < 0.5:
        spec["patience"] = 1
    if "pipeline" not in plan and not has_whole_batch_norms(program) and rng.random() < 0.3:
        spec["accumulate"] = 2
    if any(len(each.shape) == 4 for each in program.signature.inputs) and rng.random() < 0.5:
        spec["augmentations"] = ["flip", "crop"]
    if task == "classification" and rng.random() < 0.3:
        spec["label_smoothing"] = 0.1
    names = [name for name, each in program.module.named_parameters() if each.ndim > 1]
    return Case(
        model, plan, spec, {"task": task} | ({"label_column": "label"} if task != "language_modeling" else {}),
        num_rows=rng.choice([4, 9, 21, 33, 47]),
        ignored=task == "classification" and rng.random() < 0.3,
        masked=tuple(rng.sample(names, 1)) if rng.random() < 0.3 else (),
        frozen=tuple(rng.sample(names, 1)) if rng.random() < 0.3 else (),
    )  # fmt: skip


def has_whole_batch_norms(program: Program) -> bool:
    return any(isinstance(each, _NormBase) for each in program.module.modules())


def make_examples(case: Case, program: Program, directory: Path) -> BoundExamples:
    rng = np.random.default_rng(0)
    values = program.example_inputs(case.num_rows, seed=1)
    rows = {tensor.name: each.numpy() for tensor, each in zip(program.signature.inputs, values, strict=True)}
    shape = program.signature.outputs[0].shape
    scales = dict.fromkeys(rows, 1.0)
    if case.data["task"] == "classification":
        classes = shape[1]
        assert isinstance(classes, int)
        rows["label"] = rng.integers(
            0, classes, (case.num_rows, *(size for size in shape[2:] if isinstance(size, int)))
        )
        if case.ignored:
            rows["label"][rng.random(rows["label"].shape) < 0.3] = IGNORED_LABEL
    elif case.data["task"] == "regression":
        sizes = [size for size in shape[1:] if isinstance(size, int)]
        rows["label"] = rng.normal(size=(case.num_rows, *sizes)).astype(np.float32)
    return bind(program, directory, rows, scales, by_name=True, **case.data)


def train(case: Case, directory: Path, *, parallel: bool) -> Run | str:
    """Run the case's technique; return what it left, or the code of its refusal."""
    plan = {**case.plan, "timeout_seconds": 60} if parallel else None
    step = KINDS[case.spec["kind"]].model_validate({**case.spec, "parallel": plan})
    assert isinstance(step, TrainingSettings)
    directory.mkdir()

    def act() -> Run | str:
        torch.manual_seed(0)
        program, teacher = open_model(case.model), open_model(case.model)
        with torch.no_grad():
            for each in teacher.module.parameters():
                each.mul_(1.1)
        for name in case.masked:
            shape = program.module.get_parameter(name).shape
            program.masks[name] = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        program.apply_masks()
        for name in case.frozen:
            program.module.get_parameter(name).requires_grad_(False)
        reports: list[dict[str, float]] = []
        where = replace(
            context(make_examples(case, program, directory / str(os.getpid())), teacher),
            directory=directory, report=lambda *_, **metrics: reports.append(metrics),
        )  # fmt: skip
        try:
            outcome = TECHNIQUES[step.kind].run(program, step, where)
        except EngineFailure as failure:
            return failure.code
        assert isinstance(outcome.program, Program)
        return Run(outcome.program, reports, outcome.facts)

    if step.parallel is None:
        return run_to_its_end(act, directory / "result")
    return run_forked(Parallel.model_validate(plan), directory / "meeting", act)


@pytest.fixture(autouse=True)
def _one_thread_that_reports_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "REPORT_INTERVAL_SECONDS", 0.0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_a_plan_ends_where_one_process_does_or_is_refused(seed: int, tmp_path: Path) -> None:
    case = draw(seed)
    try:
        KINDS[case.spec["kind"]].model_validate({**case.spec, "parallel": case.plan})
    except ValueError:
        pytest.skip("refused at submission")
    alone = train(case, tmp_path / "alone", parallel=False)
    together = train(case, tmp_path / "together", parallel=True)

    if isinstance(alone, str) or isinstance(together, str):
        assert together == alone or (together in REFUSALS and not isinstance(alone, str)), (case, alone, together)
        return
    tolerance = LOOSE if has_whole_batch_norms(alone.program) else TOLERANCE
    assert difference(*even_out(alone.program, together.program)) < tolerance, case
    assert len(alone.reports) == len(together.reports), case
    for one, other in zip(alone.reports, together.reports, strict=True):
        assert other == pytest.approx(one, rel=10 * tolerance, abs=1e-5), case
    for name in ("epochs_run", "steps_run", "best_epoch", "stopped_early", "training_examples", "choosing_examples"):
        assert alone.facts[name] == together.facts[name], case
    flags = [[each.requires_grad for each in run.program.module.parameters()] for run in (alone, together)]
    assert flags[0] == flags[1], case


def even_out(*programs: Program) -> Iterable[Program]:
    """Yield the programs with ones added to what began at zero or is zero but for rounding."""
    for program in programs:
        with torch.no_grad():
            for name, each in program.module.state_dict().items():
                if name.endswith(("bias", "running_mean")):
                    each.add_(1.0)
        yield program
