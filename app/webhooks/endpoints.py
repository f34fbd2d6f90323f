"""The endpoints of an owner: create, look, change, rotate the secret, delete."""

import base64
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import DeliveryRow, WebhookRow
from app.errors import Conflict, InvalidRequest, NotFound, Problem
from app.ids import new_id
from app.webhooks.addresses import DestinationRefused, Destinations
from app.webhooks.announce import FAILED, PENDING

MAX_ENDPOINTS = 20
"""For each owner."""
SECRET_BYTES = 32
BY_OWNER, GONE = "by_owner", "gone"


def require_destination(destinations: Destinations, url: str) -> None:
    """Raise InvalidRequest for a URL that webhooks do not go to. Asks the resolver, so call it in no transaction."""
    try:
        destinations.resolve(*destinations.check_url(url))
    except DestinationRefused as refused:
        raise InvalidRequest([Problem("/url", str(refused))], code="webhook_url_refused") from None


def create_endpoint(
    session: Session, *, owner: str, url: str, description: str, events: Sequence[str], jobs: str
) -> WebhookRow:
    """Write an endpoint with a new secret; its URL was checked."""
    num_there = session.scalar(select(func.count()).where(WebhookRow.owner == owner)) or 0
    if num_there >= MAX_ENDPOINTS:
        raise Conflict(
            f"there are {num_there} webhooks already, and no more are possible",
            code="too_many_webhooks",
            fix="Delete one that is not needed.",
        )
    _refuse_twin(session, owner, url)
    endpoint = WebhookRow(
        id=new_id("whk"),
        owner=owner,
        url=url,
        description=description,
        events=list(events),
        jobs=jobs,
        secret=make_secret(),
        created_at=db_now(),
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def get_endpoint(session: Session, owner: str, webhook_id: str) -> WebhookRow:
    """Return an endpoint of this owner."""
    endpoint = session.scalar(select(WebhookRow).where(WebhookRow.id == webhook_id, WebhookRow.owner == owner))
    if endpoint is None:
        raise NotFound(f"there is no webhook {webhook_id}")
    return endpoint


def has_endpoint(session: Session, owner: str, webhook_id: str, *, lock: bool) -> bool:
    """Return whether this owner has an endpoint. `lock` keeps it from being deleted until the transaction ends."""
    query = select(WebhookRow.id).where(WebhookRow.id == webhook_id, WebhookRow.owner == owner)
    return session.scalar(query.with_for_update(read=True) if lock else query) is not None


def change_endpoint(session: Session, owner: str, webhook_id: str, changes: dict[str, Any]) -> WebhookRow:
    """Set url, description, events, jobs, enabled. What was not sent to one that is disabled is never sent."""
    endpoint = get_endpoint(session, owner, webhook_id)
    enabled = changes.pop("enabled", None)
    if changes.get("url", endpoint.url) != endpoint.url:
        _refuse_twin(session, owner, changes["url"])
    for name, value in changes.items():
        setattr(endpoint, name, value)
    if enabled is True:
        endpoint.disabled_reason = None
    elif enabled is False and endpoint.disabled_reason is None:
        disable(session, endpoint, BY_OWNER)
    session.flush()
    return endpoint


def rotate_secret(session: Session, owner: str, webhook_id: str, overlap_seconds: int) -> WebhookRow:
    """Give an endpoint a new secret; for the overlap, messages are signed with the old one too."""
    endpoint = get_endpoint(session, owner, webhook_id)
    endpoint.old_secret = endpoint.secret if overlap_seconds else None
    endpoint.old_secret_until = session.scalar(select(db_now(overlap_seconds))) if overlap_seconds else None
    endpoint.secret = make_secret()
    session.flush()
    return endpoint


def delete_endpoint(session: Session, owner: str, webhook_id: str) -> None:
    """Delete an endpoint with its deliveries."""
    endpoint = get_endpoint(session, owner, webhook_id)
    session.execute(delete(WebhookRow).where(WebhookRow.id == endpoint.id))


def disable(session: Session, endpoint: WebhookRow, reason: str) -> None:
    """Send nothing more to an endpoint, until its owner enables it again."""
    endpoint.disabled_reason = reason
    session.execute(
        update(DeliveryRow)
        .where(DeliveryRow.webhook_id == endpoint.id, DeliveryRow.state == PENDING)
        .values(state=FAILED, due_at=None, lease_until=None, finished_at=db_now())
        .execution_options(synchronize_session=False)
    )


def make_secret() -> str:
    """Return a new secret in the form of the specification."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def _refuse_twin(session: Session, owner: str, url: str) -> None:
    twin = session.scalar(select(WebhookRow.id).where(WebhookRow.owner == owner, WebhookRow.url == url).limit(1))
    if twin is not None:
        raise Conflict(
            f"webhook {twin} has this URL already", code="webhook_exists", fix="Change that one, or delete it first."
        )
