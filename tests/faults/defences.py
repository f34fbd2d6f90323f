"""The defences of the job contract, and how each is taken out of a running program.

A case counts only if it fails without its defence: tests/faults/test_defences.py runs each case without it.
Each removal is what a program that never had the defence would do, not a program that is broken elsewhere.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.bend import Shadow, exchange, exchange_method, exchange_name

WORKER, DISPATCHER, API = "worker", "worker.dispatch", "app"


@dataclass(frozen=True)
class Defence:
    """One thing that the contract rests on."""

    what: str
    """In words, for the table in docs/faults.md."""
    processes: tuple[str, ...]
    """The programs that it is in."""
    take_out: Callable[[], None]

    def remove(self, process: str) -> None:
        """Take it out of this process, where it is in it."""
        if process in self.processes:
            self.take_out()


def _drop_epochs() -> None:
    from app.db.tables import JobRow
    from app.jobs import lifecycle

    def move(session: Any, job_id: str, **named: Any) -> Any:
        return true_move(session, job_id, **{**named, "only_if": ()})

    def held(epoch: int) -> Any:  # noqa: ARG001 - what is left out
        return (JobRow.state.in_(lifecycle.OWNED),)

    true_move = lifecycle.move
    exchange(lifecycle.held, held)
    exchange(true_move, move)


def _drop_compare_and_set() -> None:
    """Read first, then write: the claim believes what it saw, and its UPDATE does not look again."""
    from app.jobs import lifecycle
    from app.jobs.lifecycle import State

    def move(session: Any, job_id: str, **named: Any) -> Any:
        if named["target"] == State.RUNNING:
            named = {**named, "sources": [State.QUEUED, State.RUNNING], "only_if": ()}
        return true_move(session, job_id, **named)

    def pick_next(*_: Any) -> str | None:
        # A worker that trusts its message takes the job that the message names, whatever became of it.
        return tasks_hint[-1] if tasks_hint else None

    from app.jobs import order
    from worker.supervisor import Supervisor

    tasks_hint: list[str] = []

    def remember(run: Callable[..., bool]) -> Callable[..., bool]:
        def changed(self: Supervisor, hint: str) -> bool:
            tasks_hint.append(hint)
            return run(self, hint)

        return changed

    true_move = lifecycle.move
    lifecycle.MOVES[State.RUNNING] |= {State.RUNNING}
    exchange(true_move, move)
    exchange(order.pick_next, pick_next)
    exchange_method(Supervisor, "run", remember)


def _drop_reaper() -> None:
    from worker.dispatch import Dispatcher

    exchange_method(Dispatcher, "_reap", lambda _: lambda _self: False)


def _drop_new_hints() -> None:
    from worker.dispatch import Dispatcher

    for duty in ("_sweep", "_wake"):
        exchange_method(Dispatcher, duty, lambda _: lambda _self: False)


def _drop_outbox_until_sent() -> None:
    """Mark first, publish then: what the dispatcher dies between is never published."""
    from app.jobs import outbox

    def relay(database: Any, publish: Callable[[Any], None], limit: int = 100) -> int:
        with database.session() as session:
            hints = outbox.take_outbox(session, limit)
            outbox.mark_sent(session, hints)
        for hint in hints:
            publish(hint)
        return len(hints)

    exchange(outbox.relay_outbox, relay)


def _drop_ties() -> None:
    """Neither the kernel nor the launcher ends a sandbox whose supervisor is gone."""
    from worker.sandbox import bubblewrap, launch

    def wrap(*arguments: Any, **named: Any) -> list[str]:
        return [word for word in true_wrap(*arguments, **named) if word != "--die-with-parent"]

    def popen(line: list[str], **named: Any) -> Any:
        # The launcher keeps the other end of its own control pipe, so that it never meets its end.
        return true_popen(line, **{**named, "pass_fds": (*named["pass_fds"], pipes[-1])})

    def pipe() -> tuple[int, int]:
        read, write = true_pipe()
        pipes.append(write)
        return read, write

    pipes: list[int] = []
    true_wrap, true_popen, true_pipe = bubblewrap.wrap, subprocess.Popen, os.pipe
    exchange_name(bubblewrap, "wrap", wrap)
    exchange_name(launch, "subprocess", Shadow(subprocess, Popen=popen))
    exchange_name(launch, "os", Shadow(os, pipe=pipe))


def _drop_forced_end() -> None:
    """Ask only: SIGTERM, and then it is taken for ended."""
    from worker.sandbox.launch import SandboxProcess

    def kill(self: SandboxProcess, isolated: bool) -> int:  # noqa: ARG001
        self.terminate()
        return self.process.poll() or 0

    exchange_method(SandboxProcess, "kill", lambda _: kill)


def _drop_self_fence() -> None:
    from worker.lease import Lease

    exchange_name(Lease, "lost", property(lambda self: self._is_lost))


def _drop_begin_immediate() -> None:
    from sqlalchemy import event

    from app.db import session

    def prepare(engine: Any, foreign_keys: bool, _lock_timeout_seconds: float) -> None:
        @event.listens_for(engine, "connect")
        def connect(connection: Any, _record: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    exchange(session._prepare_sqlite, prepare)


def _drop_digest_check() -> None:
    from app.storage.local import LocalSection

    def download(self: LocalSection, sha256: str, size_bytes: int, path: Path) -> None:  # noqa: ARG001
        shutil.copyfile(self._place(sha256), path)

    exchange_method(LocalSection, "download", lambda _: download)


def _drop_cancel_precedence() -> None:
    from app.jobs import lifecycle
    from app.jobs.lifecycle import State

    def move(session: Any, job_id: str, **named: Any) -> Any:
        if named["target"] == State.SUCCEEDED:
            named["sources"] = [State.RUNNING, State.CANCELLING]
        return true_move(session, job_id, **named)

    true_move = lifecycle.move
    lifecycle.MOVES[State.CANCELLING] |= {State.SUCCEEDED}
    exchange(true_move, move)


def _drop_look_for_cancels() -> None:
    from worker.lease import Lease

    exchange_name(Lease, "cancelled", property(lambda _: False))


def _drop_time_limits() -> None:
    from worker.watch import EngineWatch

    exchange_method(EngineWatch, "_check_times", lambda _: lambda _self, _engine: None)


def _drop_idempotency() -> None:
    from app.api import idempotency

    def answer(session: Any, *, work: Callable[[], tuple[int, str]], **_: Any) -> Any:  # noqa: ARG001
        return idempotency.Answer(*work(), replayed=False)

    exchange(idempotency.answer_once, answer)


def _drop_outcome_retries() -> None:
    """A worker that cannot write its outcome forgets it."""
    from worker.outcome import OutcomeWriter

    def write(self: OutcomeWriter, *outcome: Any) -> bool:
        with self.database.session() as session:
            return bool(self._settle(*outcome)(session))

    exchange_method(OutcomeWriter, "_write", lambda _: write)


def _drop_translation() -> None:
    """Errors of the driver go out as they are."""
    from app.db import session

    @contextmanager
    def untranslated() -> Any:
        yield

    exchange_name(session, "_translated", untranslated)


def _drop_early_acknowledgement() -> None:
    """Acknowledge when the task is done, so that the broker sends it again when that takes long."""
    from worker.celery_app import app
    from worker.tasks import run_job

    run_job.acks_late = True
    app.conf.task_acks_late = True


def _drop_idle_limit() -> None:
    from app.db.session import Database

    def make(init: Callable[..., None]) -> Callable[..., None]:
        return lambda self, url, **named: init(self, url, **{**named, "idle_seconds": 0.0})

    exchange_method(Database, "__init__", make)


def _drop_looks_at_connections() -> None:
    """The consumer believes that it is connected for as long as nobody says that it is not."""
    from worker.celery_app import app

    app.conf.broker_transport_options["health_check_interval"] = 3600


DEFENCES: dict[str, Defence] = {
    "epoch": Defence("every write of an attempt carries the epoch of its claim", (WORKER,), _drop_epochs),
    "compare_and_set": Defence("a claim takes a job only if it still waits", (WORKER,), _drop_compare_and_set),
    "reaper": Defence("jobs with expired leases are taken from their workers", (DISPATCHER,), _drop_reaper),
    "new_hints": Defence("waiting jobs and idle workers get new hints", (DISPATCHER,), _drop_new_hints),
    "outbox": Defence("a hint's row goes after it was published", (DISPATCHER,), _drop_outbox_until_sent),
    "ties": Defence("a sandbox ends with its supervisor", (WORKER,), _drop_ties),
    "forced_end": Defence(
        "an engine that was asked in vain is killed, and all it started", (WORKER,), _drop_forced_end
    ),
    "self_fence": Defence("a worker that cannot renew its lease ends its engine first", (WORKER,), _drop_self_fence),
    "begin_immediate": Defence("writers on SQLite queue up at BEGIN", (WORKER, DISPATCHER, API), _drop_begin_immediate),
    "digest": Defence("bytes out of storage are checked against their digest", (WORKER,), _drop_digest_check),
    "cancel_first": Defence("a cancel that was accepted wins over success", (WORKER,), _drop_cancel_precedence),
    "cancel_look": Defence("a running attempt looks whether it was cancelled", (WORKER,), _drop_look_for_cancels),
    "time_limits": Defence("deadline and progress watchdog end an attempt", (WORKER,), _drop_time_limits),
    "idempotency": Defence("a request repeated with its key does nothing", (API,), _drop_idempotency),
    "outcome_retries": Defence("an outcome is written again until the lease ends", (WORKER,), _drop_outcome_retries),
    "translation": Defence("errors of the database are answered as 503", (API,), _drop_translation),
    "idle_limit": Defence("a transaction that stands still is ended by PostgreSQL", (WORKER,), _drop_idle_limit),
    "early_ack": Defence("a message is acknowledged before its job runs", (WORKER,), _drop_early_acknowledgement),
    "connection_looks": Defence("a consumer that hears nothing connects again", (WORKER,), _drop_looks_at_connections),
}
"""By the names that WITHOUT takes."""
