"""Owners: what they may have and have, shown to administrators and, in GET /v1/me, to themselves."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict
from sqlalchemy.orm import Session

from app.access.keys import OWNER_NAME
from app.access.limits import Limits, read_limits, read_overrides, set_overrides
from app.api.openapi import problems
from app.api.service import Parts
from app.api.views import View
from app.db.access_tables import OwnerRow
from app.errors import NotFound
from app.jobs import measure_usage
from app.recipes.base import Spec
from app.settings import Settings

router = APIRouter(prefix="/v1/owners", tags=["access"])

OwnerName = Annotated[str, Path(pattern=f"^{OWNER_NAME}$", description="The owner.", examples=["vision-team"])]
MAX_NUMBER = 2**53
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
EXAMPLE: JsonDict = {"stored_bytes": 500_000_000_000, "running_jobs": 2}


class QuotaRequest(Spec):
    """The limits of an owner; what is left out or null follows the service's settings."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    stored_bytes: Number | None = None
    """Models, datasets, artifacts, checkpoints and logs; the same bytes of one owner count once."""
    running_jobs: Number | None = None
    """Jobs that run at the same time."""
    queued_jobs: Number | None = None
    """Jobs that wait, and unfinished jobs made of others."""
    requests_per_minute: Number | None = None
    """Requests of the API."""


class LimitsView(View):
    """What an owner may have."""

    stored_bytes: int | None
    """Models, datasets, artifacts, checkpoints and logs; null: no limit."""
    running_jobs: int | None
    """Jobs that run at the same time; null: no limit."""
    queued_jobs: int | None
    """Jobs that wait, and unfinished jobs made of others; null: no limit."""
    requests_per_minute: int | None
    """Requests of the API; null: no limit."""


class UsageView(View):
    """What an owner has."""

    stored_bytes: int
    """Bytes of its models, datasets, artifacts, checkpoints and logs; the same bytes count once."""
    running_jobs: int
    """Jobs that run now, checks of uploads aside."""
    queued_jobs: int
    """Jobs that wait, and unfinished jobs made of others."""


class QuotaView(View):
    """An owner with what it may have and has."""

    owner: str
    """The owner."""
    limits: LimitsView
    """The limits in force."""
    own_limits: LimitsView
    """Those that administrators gave this owner; null: the settings' limit is in force."""
    usage: UsageView
    """What it has now."""


@router.get("/{owner}/quota", operation_id="get_quota", responses=problems(404))
def get_quota(service: Parts, owner: OwnerName) -> QuotaView:
    """Show what an owner may have and has."""
    with service.database.read() as session:
        if session.get(OwnerRow, owner) is None:
            raise NotFound(f"there is no owner {owner}", fix="An owner is there once it has a key.")
        return _describe(session, service.settings, owner)


@router.put("/{owner}/quota", operation_id="set_quota", responses=problems(400, 422))
def put_quota(service: Parts, owner: OwnerName, body: QuotaRequest) -> QuotaView:
    """Give an owner limits of its own, all four at once. Limits below what it has now refuse only what is new."""
    with service.database.session() as session:
        set_overrides(session, owner, Limits(**body.model_dump()))
        view = _describe(session, service.settings, owner)
    service.limiter.forget(owner)
    return view


def describe_limits(limits: Limits) -> LimitsView:
    """Return what is shown of limits."""
    return LimitsView(
        stored_bytes=limits.stored_bytes,
        running_jobs=limits.running_jobs,
        queued_jobs=limits.queued_jobs,
        requests_per_minute=limits.requests_per_minute,
    )


def describe_usage(session: Session, owner: str) -> UsageView:
    """Return what is shown of what an owner has."""
    usage = measure_usage(session, owner)
    return UsageView(stored_bytes=usage.stored_bytes, running_jobs=usage.running_jobs, queued_jobs=usage.queued_jobs)


def _describe(session: Session, settings: Settings, owner: str) -> QuotaView:
    return QuotaView(
        owner=owner,
        limits=describe_limits(read_limits(session, settings, owner)),
        own_limits=describe_limits(read_overrides(session, owner)),
        usage=describe_usage(session, owner),
    )
