"""One Celery child process: the supervisor with all it needs, made after the fork and taken down at the end."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from app.db.session import Database
from app.settings import Settings
from app.storage import open_storage
from app.tracing import stop_tracing
from worker import shutdown
from worker.engine_process import EngineFactory
from worker.presence import Presence, describe_worker, new_worker_id
from worker.queues import name_queues
from worker.sandbox.detect import detect
from worker.settings import WorkerSettings
from worker.shares import Share, divide
from worker.standby import Standby
from worker.supervisor import Supervisor
from worker.workspace import Workspace

_LOOK_SECONDS, _LAST_SECONDS = 0.2, 10.0


@dataclass
class Ending:
    """What a child knows of its end."""

    told: bool = False
    """By a signal."""
    begun: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Slot:
    """Room for one running job."""

    supervisor: Supervisor
    presence: Presence
    workspace: Workspace
    ending: Ending = field(default_factory=Ending)

    def end(self, status: int) -> NoReturn:
        """Close, and end this process; where another thread closes already, that one does."""
        self.close()
        os._exit(status)

    def close(self) -> None:
        """Sign off and leave nothing behind; a second one waits for the process to end."""
        while not self.ending.begun.acquire(blocking=False):
            time.sleep(1)
        self.supervisor.stopping.set()
        self.supervisor.standby.close()
        self.workspace.remove()
        self.presence.end()
        self.supervisor.database.dispose()
        stop_tracing()


def open_slot(settings: Settings, worker: WorkerSettings, share: Share | None = None) -> Slot:
    """Connect, make the directory, warm the first engine, register. Without `share`, it is the worker's first slot."""
    share = share or divide(settings, worker)[0]
    settings = share.limit(settings)
    worker_id = new_worker_id()
    isolation = detect(settings.isolation)
    database = Database(settings.database_url)
    storage = open_storage(settings.storage_url, settings.storage_reserve_bytes)
    workspace = Workspace(settings.data_dir / "work", worker_id)
    standby = Standby(EngineFactory(settings, worker, isolation, workspace.path, share.gpus), keep_warm=worker.standby)
    find_shortage = partial(workspace.find_shortage, worker.min_disk_bytes)
    supervisor = Supervisor(
        database, storage, settings, worker, isolation, standby, worker_id, share.capacity, find_shortage
    )
    facts = describe_worker(isolation, supervisor.accepts_jobs, share)
    interval_seconds = min(
        settings.heartbeat_seconds, settings.worker_seen_seconds / 4, settings.health_seen_seconds / 4
    )
    presence = Presence(database, worker_id, name_queues(share.accepts), facts, interval_seconds, find_shortage)
    presence.start()
    if supervisor.accepts_jobs:
        standby.open()
    return Slot(supervisor, presence, workspace)


def give_back_on_signals(slot: Slot) -> None:
    """In a child that takes a job: when told to stop, give it back. Celery sets its own handlers after the fork."""

    def stop(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
        # No more than this: whatever takes a lock could wait for the very code that the signal interrupted.
        slot.ending.told = True

    # Celery, told by REMAP_SIGTERM to stop softly, ends its children with SIGQUIT.
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, stop)


def watch_for_end(slot: Slot) -> None:
    """In a child: end when told to, or when the parent is gone, however it ended; give a running job back first."""
    threading.Thread(target=_watch, args=(slot, os.getppid()), name="end", daemon=True).start()


def _watch(slot: Slot, parent: int) -> None:
    while os.getppid() == parent:
        if shutdown.has_begun():
            slot.presence.announce_stop()  # a running job may go on for a while
        if slot.ending.told:
            slot.supervisor.stopping.set()
            if not slot.supervisor.busy:
                slot.end(0)
        time.sleep(_LOOK_SECONDS)
    slot.supervisor.stopping.set()
    end = time.monotonic() + slot.supervisor.worker.checkpoint_grace_seconds + _LAST_SECONDS
    while slot.supervisor.busy and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    slot.end(1)
