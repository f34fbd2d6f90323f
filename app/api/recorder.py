"""Writes the audit log: every request that would change something and whose caller is known, whatever came of it."""

import re
from typing import Any

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Scope

from app.access.audit import make_entry, record_action
from app.access.keys import Caller
from app.api.owner import CALLER
from app.db.session import Database
from app.db.together import NewRow
from app.errors import PareError
from app.logs import current_request_id

READING = frozenset({"GET", "HEAD", "OPTIONS"})
TOO_MANY = 429
"""Requests that came too fast changed nothing, and would fill the log."""
RECORDED = "pare.recorded"
"""In the scope of a request that needs no entry: it is in the audit log already, or is a part of one that will be."""
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")

log = structlog.get_logger(__name__)


class Recorder:
    """The audit log of one API process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, caller: Caller, scope: Scope, status: int, headers: Headers) -> None:
        """Write down how a request is answered, before it is; where that fails, the process's log has it instead."""
        if scope["method"] in READING or status == TOO_MANY or scope.get(RECORDED):
            return
        entry = _describe(caller, scope, status, _name_target(scope, headers))
        try:
            await run_in_threadpool(self._write, status, entry)
        except PareError as error:
            log.error("an action is in this log alone", status=status, error=type(error).__name__, **entry)

    def _write(self, status: int, entry: dict[str, Any]) -> None:
        with self._database.session() as session:
            record_action(session, status=status, **entry)


def make_done(scope: Scope, status: int, target: str) -> NewRow:
    """Return the entry of a request for the transaction that does what it asks.

    Whoever commits it sets `scope[RECORDED]`.
    """
    return make_entry(status=status, **_describe(scope[CALLER], scope, status, target))


def _describe(caller: Caller, scope: Scope, status: int, target: str) -> dict[str, Any]:
    return {
        "owner": caller.owner,
        "key_id": caller.key_id,
        "action": getattr(scope.get("route"), "operation_id", None) or scope["method"],
        "target": target,
        "request_id": current_request_id(),
        "outcome": "done" if status < 400 else "refused" if status < 500 else "failed",
    }


def _name_target(scope: Scope, headers: Headers) -> str:
    """Return the id of what a request made, or else of what it is about, or else its path."""
    made = headers.get("location", "").rpartition("/")[2]
    named = [str(value) for value in scope.get("path_params", {}).values()]
    return _UNPRINTABLE.sub("?", made or (named[-1] if named else scope["path"]))
