"""Starting the ranks of a step, and telling why they failed.

Rank 0 is the engine's own process. The others are children that run the same technique on the same inputs with the
same seed up to the end of its training, and end there: what a technique prepares before it trains need not be sent.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist

from app.recipes.base import BaseStep
from app.recipes.parallel import Parallel
from app.recipes.plan import EngineError
from worker.engine.devices import place_ranks
from worker.engine.errors import EngineFailure, StepFailed
from worker.engine.parallel.group import joined
from worker.engine.parallel.work import write_work
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome

START_SECONDS = 300.0
"""For a rank to import torch on a busy machine."""
GRACE_SECONDS = 3.0
"""For the other ranks to fail after one has, before those that did not are called stuck."""
Run = Callable[[Program, Any, Context], Outcome]


class RankLost(StepFailed):
    """A process of a parallel step ended."""

    code = "rank_lost"
    fix = "See whether the machine has enough memory for that many processes, then retry the job."
    retryable = True


class RankStuck(StepFailed):
    """A process of a parallel step does not answer."""

    code = "rank_stuck"
    fix = "Retry the job; if it happens again, raise parallel.timeout_seconds or use fewer ranks."
    retryable = True


@dataclass
class Ranks:
    """The processes of the ranks from 1 on."""

    plan: Parallel
    directory: Path
    processes: "dict[int, subprocess.Popen[bytes]]"

    def wait_until_ready(self) -> None:
        """Wait for each to have read its work; raises RankLost where one ended instead."""
        until = time.monotonic() + START_SECONDS
        for rank, process in self.processes.items():
            readable, _, _ = select.select([cast(IO[bytes], process.stdout)], [], [], max(until - time.monotonic(), 0))
            if not readable:
                raise RankStuck(f"rank {rank} of {self.plan.num_ranks} did not start within {START_SECONDS:g} seconds")
            if cast(IO[bytes], process.stdout).read(1) == b"":
                process.wait()
                raise self.read_error(rank) or self._lost(rank, process.returncode)

    def explain(self, failure: Exception) -> Exception:
        """Return what really happened when rank 0 failed: another rank's own error, its death, or its silence."""
        if isinstance(failure, EngineFailure) or not _is_broken_connection(failure):
            return failure
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and any(each.poll() is None for each in self.processes.values()):
            time.sleep(0.02)
        codes = {rank: process.poll() for rank, process in self.processes.items()}
        killed = {rank: code for rank, code in codes.items() if code is not None and code < 0}
        # A rank that aborts itself may do so because another one is gone, one that is killed does not.
        for rank, code in killed.items():
            if code != -signal.SIGABRT:
                return self._lost(rank, code)
        for rank in codes:
            error = self.read_error(rank)
            if error is not None:
                return error
        if killed:
            return self._lost(*next(iter(killed.items())))
        silent = [rank for rank, code in codes.items() if code is None]
        if silent:
            return RankStuck(
                f"rank {', '.join(map(str, silent))} of {self.plan.num_ranks} did not answer within "
                f"{self.plan.timeout_seconds:g} seconds"
            )
        return RankLost(f"the ranks lost each other: {str(failure)[:300]}")

    def read_error(self, rank: int) -> EngineFailure | None:
        """Return the error that a rank found by itself, not one that it got from the others."""
        path = _error_path(self.directory, rank)
        if not path.exists():
            return None
        error = EngineError.model_validate_json(path.read_bytes())
        failure = StepFailed(f"rank {rank}: {error.detail}", code=error.code, fix=error.fix)
        failure.retryable = error.retryable
        return failure

    def end(self) -> None:
        """Kill what is left of them; a stopped process dies too."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()
            for pipe in (process.stdin, process.stdout):
                cast(IO[bytes], pipe).close()

    def _lost(self, rank: int, code: int) -> RankLost:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return RankLost(f"rank {rank} of {self.plan.num_ranks} {how}")


def run_parallel(kind: str, run: Run, program: Program, step: BaseStep, plan: Parallel, context: Context) -> Outcome:
    """Run a technique on as many processes as its plan has ranks, and return rank 0's outcome.

    Where the program's device is a GPU, every rank computes on one of its own; rank 0's is the program's.
    """
    devices = place_ranks(program.device, plan.num_ranks)
    num_threads = plan.threads_per_rank or max(1, context.num_threads // plan.num_ranks)
    work = context.directory / "ranks"
    work.mkdir()
    write_work(work / "work.pt", program, step, context)
    try:
        with _started(kind, plan, work, num_threads, devices) as ranks:
            context.report(0.0, f"starting {plan.num_ranks} processes: {plan.describe()}")
            ranks.wait_until_ready()
            try:
                with joined(plan, 0, work / "meeting", num_threads, devices[0]):
                    return run(program, step, context)
            except Exception as failure:
                explained = ranks.explain(failure)
                if explained is failure:
                    raise
                raise explained from failure
    finally:
        shutil.rmtree(work)  # as large as the model


def write_error(directory: Path, rank: int, failure: Exception, error: EngineError) -> None:
    """Leave a rank's own error for rank 0; that the connection broke is only the echo of another's."""
    if not _is_broken_connection(failure):
        path = _error_path(directory, rank)
        partial = path.with_suffix(".part")
        partial.write_text(error.model_dump_json(), encoding="utf-8")
        partial.rename(path)


def _error_path(directory: Path, rank: int) -> Path:
    return directory / f"error_{rank}.json"


@contextmanager
def _started(
    kind: str, plan: Parallel, work: Path, num_threads: int, devices: Sequence[torch.device]
) -> Iterator[Ranks]:
    ranks = Ranks(plan, work, {})
    # The work file holds programs and not only tensors; it is this process's own, and stays in its sandbox.
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_FORCE_WEIGHTS_ONLY_LOAD"}
    environment["OMP_NUM_THREADS"] = str(num_threads)
    try:
        for rank in range(1, plan.num_ranks):
            spec = {
                "kind": kind, "directory": str(work), "rank": rank, "num_threads": num_threads,
                "device": str(devices[rank]),
            }  # fmt: skip
            ranks.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "worker.engine.parallel.rank", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                bufsize=0,
            )
        yield ranks
    finally:
        ranks.end()


def _is_broken_connection(failure: Exception) -> bool:
    if isinstance(failure, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting", "Connection reset")
    return isinstance(failure, RuntimeError) and any(word in str(failure) for word in words)
