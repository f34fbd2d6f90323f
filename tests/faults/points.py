"""Points at which a process can be made to die, stop or wait: the places where half of a thing is done.

A fault happens once in the life of a data directory: the process that takes the place of a killed one goes through.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from app.db.together import NewRow
from tests.faults.bend import do_after, do_before, exchange, exchange_method, exchange_name

Act = Callable[[], None]
_HOLD_SECONDS = 120.0


def mark_of(data_dir: Path, point: str) -> Path:
    """Return the file that says that the fault has happened."""
    return data_dir / f"fault-{point}"


def release_of(data_dir: Path, point: str) -> Path:
    """Return the file for which a process that holds waits."""
    return data_dir / f"fault-{point}-go"


def make_action(point: str, action: str) -> Act:
    """Return what happens at the point: `kill` and `stop` are signals to the process, `hold` waits for a file."""
    data_dir = Path(os.environ["PARE_DATA_DIR"])
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

    def act() -> None:
        try:
            mark_of(data_dir, point).open("x").close()
        except FileExistsError:
            return
        if action in signals:
            # To this thread: where another one takes a signal to the process, this one goes on for a moment first.
            signal.pthread_kill(threading.get_ident(), signals[action])
            return
        assert action == "hold", action
        end = time.monotonic() + _HOLD_SECONDS
        while not release_of(data_dir, point).exists() and time.monotonic() < end:
            time.sleep(0.02)

    return act


def _after_commit_before_publish(act: Act) -> None:
    """API: a job and its hint are committed, the answer is not sent, nothing is published."""
    from app.db.together import insert_together
    from app.jobs import checks

    def note(session: Session, rows: Sequence[NewRow]) -> datetime:
        if any(row.table.name == "outbox" for row in rows):
            session.info["hint"] = True
        return insert_together(session, rows)

    exchange_name(checks, "insert_together", note)

    @event.listens_for(Session, "after_commit")
    def strike(session: Session) -> None:
        if session.info.pop("hint", False):
            act()


def _after_publish_before_mark(act: Act) -> None:
    """Dispatcher: the message is in the broker, its outbox row is still there."""
    from worker import dispatch

    def changed(*arguments: Any) -> Any:
        client, publish = make_publisher(*arguments)
        return client, do_after(publish, act)

    make_publisher = dispatch.make_publisher
    exchange(make_publisher, changed)


def _after_claim(act: Act) -> None:
    """Worker: the claim is committed, nothing is started."""
    from worker.attempt import Attempt

    exchange_method(Attempt, "run", lambda run: do_before(run, act))


def _after_blob_before_txn(act: Act) -> None:
    """Worker: artifacts and log are in storage, no row names them."""
    from worker.outcome import OutcomeWriter

    exchange_method(OutcomeWriter, "_write", lambda write: do_before(write, act))


def _after_txn_before_ack(act: Act) -> None:
    """Worker: the outcome is committed, the message's task has not returned."""
    from worker.outcome import OutcomeWriter

    exchange_method(OutcomeWriter, "_write", lambda write: do_after(write, act))


def _mid_heartbeat(act: Act) -> None:
    """Worker: the lease is renewed in a transaction that is still open."""
    from app.jobs import heartbeat

    exchange(heartbeat, do_after(heartbeat, act))


POINTS: dict[str, Callable[[Act], None]] = {
    "after_commit_before_publish": _after_commit_before_publish,
    "after_publish_before_mark": _after_publish_before_mark,
    "after_claim": _after_claim,
    "after_blob_before_txn": _after_blob_before_txn,
    "after_txn_before_ack": _after_txn_before_ack,
    "mid_heartbeat": _mid_heartbeat,
}
