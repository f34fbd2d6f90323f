"""Jobs: the lifecycle and the use cases. Every function works in a transaction that its caller owns."""

from app.jobs.advance import advance_parents
from app.jobs.checkpoints import (
    Place,
    StoredCheckpoint,
    delete_bytes,
    find_newest,
    record_checkpoint,
    record_resumed,
)
from app.jobs.checks import queue_check
from app.jobs.claim import Claim, StoredFile, claim, claim_next, heartbeat, record_progress
from app.jobs.control import cancel_job, delete_job, get_job, retry_job, show_job
from app.jobs.events import append_event, list_events
from app.jobs.finish import confirm_cancelled, fail, release, succeed
from app.jobs.lifecycle import MOVES, OWNED, TERMINAL, State, check_move
from app.jobs.naming import name_for_logs
from app.jobs.needs import Capacity, JobNeeds, capacity_of, derive_needs, needs_of
from app.jobs.order import find_saturated
from app.jobs.outbox import Hint, count_waiting, mark_sent, relay_outbox, sweep_unpublished, take_outbox
from app.jobs.parents import name_parts
from app.jobs.places import Places
from app.jobs.quotas import measure_usage
from app.jobs.reap import reap_expired
from app.jobs.retention import forget_files
from app.jobs.submit import submit_job, validate_submission
from app.jobs.waiting import Wait, explain_wait, note_waits
from app.jobs.wake import wake_workers
from app.jobs.workers import (
    accepts_jobs,
    count_running,
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
    "Capacity",
    "Claim",
    "Hint",
    "JobNeeds",
    "Place",
    "Places",
    "State",
    "StoredCheckpoint",
    "StoredFile",
    "Wait",
    "accepts_jobs",
    "advance_parents",
    "append_event",
    "cancel_job",
    "capacity_of",
    "check_move",
    "claim",
    "claim_next",
    "confirm_cancelled",
    "count_running",
    "count_waiting",
    "delete_bytes",
    "delete_job",
    "derive_needs",
    "explain_wait",
    "fail",
    "find_newest",
    "find_saturated",
    "forget_files",
    "forget_workers",
    "get_job",
    "heartbeat",
    "list_events",
    "list_workers",
    "mark_sent",
    "measure_usage",
    "name_for_logs",
    "name_parts",
    "needs_of",
    "note_waits",
    "queue_check",
    "reap_expired",
    "record_checkpoint",
    "record_progress",
    "record_resumed",
    "register_worker",
    "relay_outbox",
    "release",
    "remove_worker",
    "retry_job",
    "show_job",
    "submit_job",
    "succeed",
    "sweep_unpublished",
    "take_outbox",
    "touch_worker",
    "validate_submission",
    "wake_workers",
]
