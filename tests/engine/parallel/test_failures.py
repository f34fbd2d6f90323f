"""A rank that dies or hangs ends the step soon, with a name for it, and leaves nothing behind."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from app.recipes.training import Finetune
from tests.engine.parallel.runs import run
from tests.engine.techniques.learning import bind, context, digit_examples, make_cnn
from tests.worker.conftest import find_processes
from worker.engine.errors import EngineFailure
from worker.engine.parallel.launch import run_parallel
from worker.engine.techniques import finetune
from worker.engine.techniques.base import Context


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def strike(directory: Path, number: int) -> Callable[..., None]:
    """Return a report that sends rank 1 a signal when the first step is reported."""
    struck: list[int] = []

    def report(*_: object, **__: object) -> None:
        if not struck:
            struck.extend(find_processes(str(directory)))
            for process in struck:
                os.kill(process, number)

    return report


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, "rank_lost"), (signal.SIGSTOP, "rank_stuck")])
def test_a_rank_that_dies_or_hangs(tmp_path: Path, number: int, code: str) -> None:
    program = make_cnn(4)
    examples = digit_examples(program, tmp_path)
    step = Finetune.model_validate({"kind": "finetune", "epochs": 500, "parallel": {"data": 2, "timeout_seconds": 3}})
    where: Context = replace(context(examples), directory=tmp_path, report=strike(tmp_path, number))
    assert step.parallel is not None

    with pytest.raises(EngineFailure) as caught:
        run_parallel("finetune", finetune.run, program, step, step.parallel, where)

    assert caught.value.code == code
    assert caught.value.retryable
    assert "rank 1 of 2" in caught.value.detail
    assert find_processes(str(tmp_path)) == []
    assert not dist.is_initialized()


def test_what_fails_on_all_ranks_fails_with_its_own_name(tmp_path: Path) -> None:
    program = make_cnn(4)
    with torch.no_grad():
        program.module.get_parameter("fc.weight").fill_(1e38)
    with pytest.raises(EngineFailure) as caught:
        run(program, digit_examples(program, tmp_path), tmp_path / "run", parallel={"data": 2}, keep_best=False)
    assert caught.value.code in ("training_diverged", "output_not_finite")
    assert find_processes(str(tmp_path)) == []


def test_an_error_of_one_rank_alone_is_told(tmp_path: Path) -> None:
    program = make_cnn(4)
    examples = digit_examples(program, tmp_path)
    (tmp_path / "data.npz").rename(tmp_path / "gone.npz")  # rank 0 has it open, rank 1 looks for it
    with pytest.raises(EngineFailure) as caught:
        run(program, examples, tmp_path / "run", parallel={"data": 2})
    assert caught.value.code == "engine_crash"
    assert "data.npz" in caught.value.detail
    assert find_processes(str(tmp_path)) == []


def test_fewer_rows_than_parts_are_refused(tmp_path: Path) -> None:
    program = make_cnn(4)
    digits = digit_examples(program, tmp_path)
    assert digits.num_training > 4
    few = bind(program, tmp_path / "few", _rows(4), {"image": 1.0}, task="classification", label_column="label")
    with pytest.raises(EngineFailure) as caught:
        run(program, few, tmp_path / "run", parallel={"data": 4})
    assert caught.value.code == "too_few_examples"


def _rows(num_rows: int) -> dict[str, Any]:
    return {"image": torch.rand(num_rows, 1, 8, 8).numpy(), "label": torch.arange(num_rows).numpy()}
