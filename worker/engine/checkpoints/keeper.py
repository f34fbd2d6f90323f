"""When a checkpoint is written, and where a job goes on after a crash.

While a step trains: once in `interval_seconds`, between two optimizer steps, and at once when the worker stops. At the
end of a step that took a while. Steps that do not train are done again from their begin, and training inside a step is
taken up by doing again what comes before it in the step, from the program as the step found it.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.recipes.plan import CheckpointFile, Plan
from app.recipes.pruning import PruneMagnitude
from app.recipes.recipe import Step
from app.recipes.sharing import ShareWeights
from app.recipes.training import TrainingSettings
from worker.engine.checkpoints.archive import NotRestorable, read_archive, write_archive
from worker.engine.checkpoints.state import (
    Checkpoint,
    Header,
    Record,
    encode_final,
    encode_parts,
    identify,
    read_checkpoint,
)
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.programs.program import FileProgram, Program
from worker.engine.progress import Reporter
from worker.engine.training.loop import Trained
from worker.engine.training.run import Run, collect

NUM_KEPT = 2
"""Files in the directory at most, should nobody take them away."""
STEP_END_SHARE = 0.05
"""Of the interval: a step whose work took less is not worth a file of its own."""


class Checkpoints:
    """The checkpoints of one job."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        reporter: Reporter,
        stop: StopRequest,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert plan.checkpoint_seconds is not None
        self.work = identify(plan)
        self.stop = stop
        self._inputs = [directory / "in" / name for name in plan.checkpoints]
        self._outputs, self._scratch = directory / "out" / "checkpoints", directory / "tmp"
        self._interval = plan.checkpoint_seconds
        self._reporter = reporter
        self._clock = clock
        self._written_at = clock()
        self._number = 0
        self._is_on = True

    def find(self) -> Checkpoint | None:
        """Return the newest checkpoint that can be read, None where the job starts from its begin."""
        for path in self._inputs:
            try:
                found = read_checkpoint(path, self.work)
            except NotRestorable as refusal:
                self._reporter.note(f"a checkpoint was left alone: {refusal}")
                continue
            self._written_at = self._clock()
            self._reporter.announce(resumed=path.name)
            return found
        return None

    def begin_step(
        self, index: int, step: Step, program: Program, record: Record, resumed: Checkpoint | None
    ) -> "StepCheckpoints | None":
        """Return the checkpoints of a step's training, None where it has none or cannot be taken up inside."""
        if not self._is_on or not _can_be_taken_up(step):
            return None
        if resumed is not None:
            return StepCheckpoints(self, index, record, resumed.structure, _programs(resumed.tensors), resumed)
        if index == 0:
            return StepCheckpoints(self, index, record, None, {}, None)
        path = self._scratch / f"before_{index}"
        try:
            structure, tensors = encode_parts(program)
            # On disk and mapped: the weights that the step found must not take memory beside those that it changes.
            write_archive(path, {}, tensors)
            return StepCheckpoints(self, index, record, structure, read_archive(path)[1], None)
        except (NotRestorable, OSError) as refusal:
            self._give_up(refusal)
            return None

    def end_step(self, index: int, program: Program | FileProgram, module: Program, record: Record) -> None:
        """Write what the step left, if it would take a while to do again or the worker stops."""
        worth = self._clock() - self._written_at >= STEP_END_SHARE * self._interval
        if not self._is_on or not (worth or self.stop.requested):
            return
        try:
            structure, tensors = encode_parts(module)
            final = None
            if isinstance(program, FileProgram):
                final = (program.path.suffix, program.parameters, program.nonzero_parameters)
                tensors["final"] = encode_final(program)
        except (NotRestorable, OSError) as refusal:
            self._give_up(refusal)
            return
        header = self.describe(record, step=index + 1, final=final)
        self.write(Checkpoint(header, structure, tensors), f"step {index} is done")

    def describe(self, record: Record, **more: Any) -> Header:
        """Return a header of this work."""
        return Header(
            work=self.work,
            steps=tuple(record.steps),
            warnings=tuple(record.warnings),
            sensitivity=tuple(record.sensitivity),
            effects=record.effects,
            **more,
        )

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough, or the worker stops."""
        return self._is_on and (self._clock() - self._written_at >= self._interval or self.stop.requested)

    def write(self, checkpoint: Checkpoint, message: str) -> None:
        """Write and announce a checkpoint; then end the process if the worker stops."""
        name = f"{self._number:06d}.checkpoint"
        started_at = self._clock()
        try:
            self._outputs.mkdir(parents=True, exist_ok=True)
            for old in sorted(self._outputs.iterdir())[: 1 - NUM_KEPT or None]:
                with suppress(FileNotFoundError):  # the worker took it away just now
                    old.unlink()
            written = checkpoint.write(self._outputs / name)
        except (NotRestorable, OSError) as refusal:
            self._give_up(refusal)
            return
        self._number += 1
        self._written_at = self._clock()
        seconds = self._written_at - started_at
        self._reporter.note(f"  checkpoint {name}: {written.size_bytes} bytes in {seconds:.2f} s, {message}")
        self._reporter.announce(
            checkpoint=CheckpointFile(name=name, size_bytes=written.size_bytes, sha256=written.sha256)
        )
        if self.stop.requested:
            self.stop.end()

    def _give_up(self, refusal: Exception) -> None:
        """A job goes on without checkpoints where one cannot be written: they help, they are not the work."""
        self._reporter.note(f"no more checkpoints: {refusal}")
        self._is_on = False
        if self.stop.requested:
            self.stop.end()


class StepCheckpoints:
    """The checkpoints of the training runs of one step."""

    def __init__(
        self,
        job: Checkpoints,
        index: int,
        record: Record,
        structure: dict[str, Any] | None,
        program: dict[str, Tensor],
        resumed: Checkpoint | None,
    ) -> None:
        self._job, self._index, self._record = job, index, record
        self._structure, self._program = structure, program
        self._resumed = resumed
        self._waiting = list(resumed.header.finished_runs) if resumed is not None else []
        self._finished: list[Trained] = []
        self._seconds = resumed.header.seconds if resumed is not None else 0.0
        self._started_at = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent in the step, earlier attempts included."""
        return self._seconds + time.perf_counter() - self._started_at

    def skip(self) -> Trained | None:
        """Return what a run did that an earlier attempt finished."""
        if not self._waiting:
            return None
        self._finished.append(self._waiting.pop(0))
        return self._finished[-1]

    def restore(self, run: Run) -> bool:
        """Put the run where the checkpoint found it, if it did."""
        self._job.stop.is_awaited = True
        resumed, self._resumed = self._resumed, None
        return resumed is not None and resumed.restore_run(run)

    def follow(self) -> "FollowedCheckpoints":
        """Return what takes part on another rank."""
        path = None if self._resumed is None else self._resumed.path
        return FollowedCheckpoints(self._job.work, path)

    def offer(self, run: Run) -> None:
        """Write a checkpoint if one is due; under a parallel plan this rank decides for all."""
        if not run.strategy.decide(self._job.is_due):
            return
        position, tensors = collect(run)
        header = self._job.describe(
            self._record,
            step=self._index,
            seconds=self.seconds,
            finished_runs=tuple(self._finished),
            position=position,
        )
        tensors = {f"run/{name}": each for name, each in tensors.items()} | self._program
        self._job.write(
            Checkpoint(header, self._structure, tensors),
            f"step {self._index}, training step {run.step} of {run.num_steps}",
        )
        run.strategy.meet()

    def finish(self, trained: Trained) -> None:
        """Note that the run is over."""
        self._job.stop.is_awaited = False
        self._finished.append(trained)


@dataclass(frozen=True)
class FollowedCheckpoints:
    """The checkpoints of a step on a rank other than 0, which writes none."""

    work: str
    path: Path | None
    """What the step goes on from."""

    def skip(self) -> None:
        """Do every run: a step with a parallel plan has only one."""

    def restore(self, run: Run) -> bool:
        """Put the run where the checkpoint found it, as rank 0 does."""
        return self.path is not None and read_checkpoint(self.path, self.work).restore_run(run)

    def offer(self, run: Run) -> None:
        """Give this rank's part of the state where rank 0 writes a checkpoint, and wait until it has."""
        if run.strategy.decide(False):
            collect(run)
            run.strategy.meet()

    def finish(self, trained: Trained) -> None:
        """Never called: rank 0 alone sees the end of a run."""

    def follow(self) -> "FollowedCheckpoints":
        """Return itself."""
        return self


def _can_be_taken_up(step: Step) -> bool:
    """Whether doing a step's other work again, on what it found, leads back to a run in its middle.

    The rounds of prune_structured do not: how many channels one removes hangs on the training before it.
    """
    if isinstance(step, PruneMagnitude | ShareWeights):
        return step.training is not None
    return isinstance(step, TrainingSettings)


def _programs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in tensors.items() if name.startswith("program/")}
