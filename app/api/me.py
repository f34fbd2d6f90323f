"""Who am I? What a key opens."""

from fastapi import APIRouter

from app.access.keys import SCOPES, Scope, get_key
from app.access.limits import read_limits
from app.api.keys import KeyView, describe_key
from app.api.owner import CurrentCaller
from app.api.owners import LimitsView, UsageView, describe_limits, describe_usage
from app.api.service import Parts
from app.api.views import View

router = APIRouter(prefix="/v1/me", tags=["access"])


class MeView(View):
    """The caller."""

    owner: str
    """Whose things the caller sees and changes."""
    scopes: list[Scope]
    """What the caller may do."""
    key: KeyView | None
    """The key that was sent; null where nobody is asked for one."""
    limits: LimitsView
    """What the owner may have."""
    usage: UsageView
    """What the owner has now."""


@router.get("", operation_id="get_me")
def get_me(service: Parts, caller: CurrentCaller) -> MeView:
    """Show who the service takes you for, what your key may do, and what its owner may have and has."""
    with service.database.read() as session:
        return MeView(
            owner=caller.owner,
            scopes=[scope for scope in SCOPES if scope in caller.scopes],
            key=describe_key(get_key(session, caller.key_id)) if caller.key_id is not None else None,
            limits=describe_limits(read_limits(session, service.settings, caller.owner)),
            usage=describe_usage(session, caller.owner),
        )
