"""Writes the audit log: every request that would change something and whose caller is known, whatever came of it."""

import re

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Scope

from app.access.audit import record_action
from app.access.keys import Caller
from app.db.session import Database
from app.errors import PareError
from app.logs import current_request_id

READING = frozenset({"GET", "HEAD", "OPTIONS"})
TOO_MANY = 429
"""Requests that came too fast changed nothing, and would fill the log."""
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")

log = structlog.get_logger(__name__)


class Recorder:
    """The audit log of one API process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, caller: Caller, scope: Scope, status: int, headers: Headers) -> None:
        """Write down how a request is answered, before it is; where that fails, the process's log has it instead."""
        if scope["method"] in READING or status == TOO_MANY:
            return
        entry = {
            "owner": caller.owner,
            "key_id": caller.key_id,
            "action": getattr(scope.get("route"), "operation_id", None) or scope["method"],
            "target": _name_target(scope, headers),
            "request_id": current_request_id(),
            "outcome": "done" if status < 400 else "refused" if status < 500 else "failed",
        }
        try:
            await run_in_threadpool(self._write, status, entry)
        except PareError as error:
            log.error("an action is in this log alone", status=status, error=type(error).__name__, **entry)

    def _write(self, status: int, entry: dict[str, str]) -> None:
        with self._database.session() as session:
            record_action(session, status=status, **entry)


def _name_target(scope: Scope, headers: Headers) -> str:
    """Return the id of what a request made, or else of what it is about, or else its path."""
    made = headers.get("location", "").rpartition("/")[2]
    named = [str(value) for value in scope.get("path_params", {}).values()]
    return _UNPRINTABLE.sub("?", made or (named[-1] if named else scope["path"]))
