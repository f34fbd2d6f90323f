"""A rank that dies or hangs ends the step soon, with a name for it, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from app.recipes.parallel import Parallel
from app.recipes.plan import EngineError
from tests.engine.parallel.runs import run_forked, run_started
from tests.engine.techniques.learning import digit_examples, make_cnn
from tests.worker.conftest import find_processes, wait_until
from worker.engine.errors import EngineFailure
from worker.engine.parallel.group import current_group
from worker.engine.parallel.launch import RankLost, Ranks, write_error


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def strike(directory: Path, number: int) -> Callable[..., None]:
    """Return a report that sends rank 1 a signal when the first step is reported."""
    struck: list[int] = []

    def report(fraction: float, *_: object, **__: object) -> None:
        if fraction and not struck:
            struck.extend(find_processes(str(directory)))
            for process in struck:
                os.kill(process, number)

    return report


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, "rank_lost"), (signal.SIGSTOP, "rank_stuck")])
def test_a_rank_that_dies_or_hangs(tmp_path: Path, number: int, code: str) -> None:
    program = make_cnn(4)
    examples = digit_examples(program, tmp_path)

    failure = run_started(
        program, examples, tmp_path / "run", strike(tmp_path / "run", number), epochs=500,
        parallel={"data": 2, "timeout_seconds": 3},
    )  # fmt: skip

    assert failure is not None
    assert failure.code == code
    assert failure.retryable
    assert "rank 1 of 2" in failure.detail
    assert find_processes(str(tmp_path)) == []


def test_only_a_checkpoint_is_waited_for_longer_than_the_limit(tmp_path: Path) -> None:
    plan = Parallel(data=2, tensor=2, timeout_seconds=1)
    found, too_long = tmp_path / "found", 15

    def act() -> list[float]:
        group = current_group()
        if group.rank == 3:
            time.sleep(1.5)  # writing, say
        group.meet()
        if group.rank > 0:
            with suppress(AssertionError):
                wait_until(found.exists, too_long)
            return []
        waits = []
        for wait in (
            lambda: group.gather(0),
            lambda: group.sum(torch.ones(1), "data"),
            lambda: group.sum(torch.ones(1), "tensor"),
        ):
            started_at = time.monotonic()
            with pytest.raises(RuntimeError):
                wait()
            waits.append(time.monotonic() - started_at)
        found.touch()
        return waits

    waits = run_forked(plan, tmp_path / "meeting", act)
    assert len(waits) == 3
    assert max(waits) < too_long / 2, waits


def test_ranks_end_with_the_engine(tmp_path: Path) -> None:
    program = make_cnn(4)
    examples = digit_examples(program, tmp_path)

    def die(fraction: float, *_: object, **__: object) -> None:
        if not fraction:
            return  # its ranks start
        assert find_processes(str(tmp_path / "run")) != []
        (tmp_path / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError):
        run_started(program, examples, tmp_path / "run", die, epochs=500, parallel={"data": 2})
    assert (tmp_path / "killed").exists(), "the engine failed before rank 1 was there"
    wait_until(lambda: find_processes(str(tmp_path)) == [], 10, "the end of rank 1")


def test_what_fails_on_all_ranks_fails_with_its_own_name(tmp_path: Path) -> None:
    program = make_cnn(4)
    with torch.no_grad():
        program.module.get_parameter("fc.weight").fill_(1e38)
    failure = run_started(
        program, digit_examples(program, tmp_path), tmp_path / "run", parallel={"data": 2}, keep_best=False
    )
    assert failure is not None
    assert failure.code in ("training_diverged", "output_not_finite")
    assert find_processes(str(tmp_path)) == []


def test_an_error_of_one_rank_alone_is_told(tmp_path: Path) -> None:
    program = make_cnn(4)
    opened = os.open(tmp_path, os.O_RDONLY)  # which rank 0 has too, as our copy, and rank 1 has not
    try:
        examples = digit_examples(program, Path(f"/proc/self/fd/{opened}"))
        failure = run_started(program, examples, tmp_path / "run", parallel={"data": 2})
    finally:
        os.close(opened)
    assert failure is not None
    assert failure.code == "engine_crash"
    assert "data.npz" in failure.detail
    assert find_processes(str(tmp_path)) == []


def test_a_rank_that_aborts_is_an_echo_of_one_that_failed_by_itself(tmp_path: Path) -> None:
    ends = {1: "os.abort()", 2: "sys.exit(1)"}
    ranks = Ranks(
        Parallel(data=3),
        tmp_path,
        {
            rank: subprocess.Popen(
                [sys.executable, "-c", f"import os, sys; {end}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for rank, end in ends.items()
        },
    )
    echo = RuntimeError("gloo: Connection closed by peer")
    try:
        for process in ranks.processes.values():
            process.wait()
        lost = ranks.explain(echo)
        assert isinstance(lost, RankLost)
        assert str(lost) == "rank 1 of 3 was killed by signal 6"
        error = EngineError(code="out_of_memory", detail="memory ran out", fix="Use less.")
        write_error(tmp_path, 2, MemoryError("memory ran out"), error)
        own = ranks.explain(echo)
        assert isinstance(own, EngineFailure)
        assert (own.code, str(own)) == ("out_of_memory", "rank 2: memory ran out")
    finally:
        ranks.end()
