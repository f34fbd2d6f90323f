"""The audit log, for administrators."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from sqlalchemy import select

from app.access.keys import OWNER_NAME
from app.api.cursors import Cursor, Limit, read_page
from app.api.openapi import problems
from app.api.service import Parts
from app.api.views import View
from app.db.access_tables import AuditRow

router = APIRouter(prefix="/v1/audit", tags=["access"])


class ActionView(View):
    """Something that was done, or that somebody tried to do."""

    id: str
    """Names the entry."""
    created_at: datetime
    """When."""
    owner: str
    """For which owner it was done; `(service)` where the service's own command did it."""
    key_id: str | None
    """With which key; null where none is asked for."""
    action: str
    """What: the operation's name in the API description, or the method alone where it did not get that far."""
    target: str | None
    """To what: an id, or the path."""
    request_id: str | None
    """The request, as the service's log names it."""
    status: int | None
    """How it was answered."""
    outcome: Literal["done", "refused", "failed"]
    """Whether it was done, refused, or failed in the service."""


class AuditPage(View):
    """One page of the audit log, newest first."""

    items: list[ActionView]
    """The entries."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


@router.get("", operation_id="list_actions", responses=problems(400, 422))
def list_actions(
    service: Parts,
    cursor: Cursor = None,
    limit: Limit = 50,
    owner: Annotated[str | None, Query(pattern=f"^{OWNER_NAME}$", description="Only what this owner did.")] = None,
    key_id: Annotated[
        str | None, Query(pattern=r"^key_[a-z0-9]{26}$", description="Only what was done with this key.")
    ] = None,
) -> AuditPage:
    """List every change that anybody made or tried to make, newest first."""
    query = select(AuditRow)
    if key_id is not None:
        query = query.where(AuditRow.key_id == key_id)
    with service.database.read() as session:
        rows, next_cursor = read_page(session, AuditRow, owner, cursor, limit, query)
        return AuditPage(items=[_describe(row) for row in rows], next_cursor=next_cursor)


def _describe(row: AuditRow) -> ActionView:
    return ActionView.model_validate({name: getattr(row, name) for name in ActionView.model_fields})
