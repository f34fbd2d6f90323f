"""The one task. Its message is a hint and comes from outside: whatever it holds, the worker survives it."""

import re

import structlog

from app.errors import PareError
from app.ids import ALPHABET, LENGTH
from worker.celery_app import app
from worker.slot import Slot, give_back_on_signals

_JOB_ID = re.compile(rf"job_[{ALPHABET}]{{{LENGTH}}}")
_log = structlog.get_logger(__name__)

slot: Slot | None = None
"""This process's slot; opened after the fork."""


@app.task(name="pare.run_job", ignore_result=True, acks_late=False)
def run_job(*arguments: object, **named: object) -> None:
    """Wake up and run the job that is next. The database says which; a stale or repeated hint does nothing."""
    job_id = arguments[0] if len(arguments) == 1 and not named else None
    if not isinstance(job_id, str) or _JOB_ID.fullmatch(job_id) is None:
        _log.warning("not a job id", arguments=repr(arguments)[:200])
        return
    assert slot is not None, "the slot is opened when the process starts"
    give_back_on_signals(slot)
    try:
        slot.supervisor.run(job_id)
    except PareError as error:
        # The hint is lost, the job is not: the dispatcher sends another.
        _log.warning("could not look for a job", hint=job_id, error=error.code, detail=error.detail)
    if slot.supervisor.stopping.is_set():
        slot.end(0)
