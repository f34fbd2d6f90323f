"""One attempt of a job, from claim to finish: engines are started, watched, ended and believed in nothing.

Every way out ends all processes of the attempt first, removes its directory, and writes at most one transaction, which
carries the epoch of the claim.
"""

from typing import TYPE_CHECKING, cast

import structlog

from app.errors import PareError
from app.jobs import Claim
from app.recipes.plan import Action, EngineError, EngineResult, Plan
from app.recipes.training import TrainingSettings
from app.storage import checkpoint_storage, owner_storage
from worker.checkpoints import CheckpointShelf
from worker.engine_process import EngineProcess
from worker.failures import AttemptEnded, AttemptFailed, defect, describe_second_shortage
from worker.job_files import check_artifacts, place_artifacts, place_inputs, read_result
from worker.lease import Lease
from worker.outcome import OutcomeWriter, describe
from worker.standby import EngineUnavailable
from worker.watch import EngineWatch

if TYPE_CHECKING:
    from worker.supervisor import Supervisor

_START_SECONDS = 120.0

_log = structlog.get_logger(__name__)


class Attempt:
    """One claim and its engines."""

    def __init__(self, supervisor: "Supervisor", held: Claim, claimed_at: float) -> None:
        self._supervisor = supervisor
        self._claim = held
        self._claimed_at = claimed_at
        settings, worker, storage = supervisor.settings, supervisor.worker, supervisor.storage
        self._lease = Lease(supervisor.database, held, settings, worker, claimed_at)
        self._engines: list[tuple[str, EngineProcess]] = []
        """With what each was for, in the order they were taken."""
        self._section = owner_storage(storage, held.owner)
        max_bytes = min(settings.max_artifact_bytes, worker.max_disk_bytes)
        self._shelf = CheckpointShelf(checkpoint_storage(storage, held.job_id), held.checkpoints, max_bytes)
        self._watch = EngineWatch(
            settings, worker, held, claimed_at, self._lease, self._shelf, supervisor.stopping.is_set
        )
        layers = supervisor.isolation.layers
        self._writer = OutcomeWriter(supervisor.database, self._section, held, self._lease, layers)

    def run(self) -> None:
        """Run the action; whatever happens, end what was started and write the outcome."""
        self._lease.start()
        outcome: EngineResult | AttemptEnded
        try:
            outcome = self._act()
        except AttemptEnded as ended:
            outcome = ended
        except EngineUnavailable as error:
            outcome = AttemptFailed(defect("engine_unavailable", str(error)[:2000], retryable=True))
        except (PareError, OSError) as error:
            outcome = AttemptFailed(describe(error))
        except Exception:  # the edge of the attempt: our own mistakes must end it too, not leave it hanging
            _log.exception("the worker failed")
            outcome = AttemptFailed(defect("worker_failed", "the worker failed; its log says why", retryable=True))
        finally:
            for _, engine in self._engines:
                engine.kill()
        try:
            if self._writer.finish(outcome, self._engines):
                self._shelf.clear()
        finally:
            self._lease.release()
            for _, engine in self._engines:
                engine.remove()

    def _act(self) -> EngineResult:
        held, settings = self._claim, self._supervisor.settings
        try:
            engine, plan, result = self._try(split_batches=1)
        except AttemptFailed as failed:
            if not self._can_split(failed.error):
                raise
            _log.warning("memory ran out; once more with smaller parts")
            try:
                engine, plan, result = self._try(split_batches=2)
            except AttemptFailed as again:
                raise AttemptFailed(describe_second_shortage(again.error)) from None
        check_artifacts(
            engine.directory,
            result,
            settings.max_artifact_bytes,
            self._supervisor.worker.max_disk_bytes,
            check_end=self._watch.check_end,
        )
        if held.action == "optimize":
            self._verify(engine, plan, tuple(artifact.name for artifact in result.artifacts))
        return result

    def _try(self, *, split_batches: int) -> tuple[EngineProcess, Plan, EngineResult]:
        """Run the action in an engine of its own, from the newest checkpoint on."""
        held, settings = self._claim, self._supervisor.settings
        engine = self._take_engine("work", held.recipe.plan.num_ranks if held.recipe is not None else 1)
        inputs = place_inputs(engine.directory, held, self._section)
        resumable = held.action == "optimize"
        plan = Plan(
            action=cast(Action, held.action),
            model=inputs.model,
            teachers=inputs.teachers,
            datasets=inputs.datasets,
            recipe=held.recipe,
            num_threads=settings.engine_threads,
            isolation=tuple(self._supervisor.isolation.layers),
            checkpoint_seconds=settings.checkpoint_seconds if resumable else None,
            checkpoints=self._shelf.place(engine.directory) if resumable else (),
            split_batches=split_batches,
        )
        self._watch.work(engine, plan)
        if engine.inbox.first_line_at is not None:
            self._supervisor.first_line_seconds.append(engine.inbox.first_line_at - self._claimed_at)
        return engine, plan, self._read(engine, held.action)

    def _can_split(self, error: EngineError) -> bool:
        """Whether memory ran out in a step whose batches can be taken in smaller parts."""
        recipe, last = self._claim.recipe, self._engines[-1][1].inbox.last
        if error.code != "out_of_memory" or recipe is None or last is None or last.step is None:
            return False
        step = recipe.steps[last.step] if last.step < len(recipe.steps) else None
        training = step if isinstance(step, TrainingSettings) else getattr(step, "training", None)
        return training is not None and training.batch_size > training.accumulate

    def _verify(self, source: EngineProcess, plan: Plan, names: tuple[str, ...]) -> None:
        """Have a fresh process reload every artifact before the job may succeed."""
        engine = self._take_engine("verify")
        place_artifacts(source.directory, engine.directory, names)
        left_out = {"model": None, "teachers": (), "datasets": (), "checkpoints": (), "checkpoint_seconds": None}
        self._watch.work(engine, plan.model_copy(update={"action": "verify", "artifacts": names, **left_out}))
        self._read(engine, "verify")

    def _take_engine(self, purpose: str, num_ranks: int = 1) -> EngineProcess:
        engine = self._supervisor.standby.take(_START_SECONDS, give_up=self._watch.must_end, num_ranks=num_ranks)
        self._engines.append((purpose, engine))
        return engine

    def _read(self, engine: EngineProcess, action: str) -> EngineResult:
        result = read_result(engine.directory, action)
        if result.error is not None:
            raise AttemptFailed(result.error)
        return result
