"""Jobs: the lifecycle and the use cases. Every function works in a transaction that its caller owns."""

from app.jobs.advance import advance_parents
from app.jobs.checks import queue_check
from app.jobs.claim import Claim, StoredFile, claim, heartbeat, record_progress
from app.jobs.control import cancel_job, delete_job, get_job, retry_job
from app.jobs.events import append_event, list_events
from app.jobs.finish import confirm_cancelled, fail, release, succeed
from app.jobs.lifecycle import MOVES, OWNED, TERMINAL, State, check_move
from app.jobs.outbox import Hint, count_waiting, mark_sent, relay_outbox, sweep_unpublished, take_outbox
from app.jobs.reap import reap_expired
from app.jobs.submit import submit_job, validate_submission
from app.jobs.workers import (
    accepts_jobs,
    forget_workers,
    list_workers,
    register_worker,
    remove_worker,
    touch_worker,
)

__all__ = [
    "MOVES",
    "OWNED",
    "TERMINAL",
    "Claim",
    "Hint",
    "State",
    "StoredFile",
    "accepts_jobs",
    "advance_parents",
    "append_event",
    "cancel_job",
    "check_move",
    "claim",
    "confirm_cancelled",
    "count_waiting",
    "delete_job",
    "fail",
    "forget_workers",
    "get_job",
    "heartbeat",
    "list_events",
    "list_workers",
    "mark_sent",
    "queue_check",
    "reap_expired",
    "record_progress",
    "register_worker",
    "relay_outbox",
    "release",
    "remove_worker",
    "retry_job",
    "submit_job",
    "succeed",
    "sweep_unpublished",
    "take_outbox",
    "touch_worker",
    "validate_submission",
]
