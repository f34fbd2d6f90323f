"""When messages are sent: each is tried until it is taken or its schedule ends. Any number of senders may run.

A message may arrive twice (a sender that dies between sending and writing so down); its id stays the same.
"""

import random
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import DeliveryRow, WebhookRow
from app.errors import Conflict, NotFound
from app.webhooks.announce import DELIVERED, FAILED, PENDING, TEST, add_delivery
from app.webhooks.endpoints import GONE, disable, get_endpoint
from app.webhooks.sending import Outcome, Parcel

MINUTE, HOUR = 60.0, 3600.0
PAUSES_SECONDS = (5.0, 5 * MINUTE, 30 * MINUTE, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR)
"""After each attempt that failed, the example of Standard Webhooks: ten attempts in 75.6 hours."""
MAX_ATTEMPTS = len(PAUSES_SECONDS) + 1
JITTER = 0.1
"""Pauses are up to this share longer or shorter, so that what failed together does not come back together."""
MAX_RETRY_AFTER_SECONDS = 24 * HOUR
LEASE_SECONDS = 90.0
"""Longer than an attempt, a slow resolver included; then another sender takes over."""
MAX_AT_ONCE_PER_OWNER = 4
MAX_LOOKED_AT = 200
"""Endpoints with something due that one look considers."""
MAX_KEPT_ATTEMPTS = 30
HTTP_GONE = 410


def is_due(session: Session) -> bool:
    """Return whether there may be something for `claim_due`. It only reads, so that looking holds up nobody."""
    return session.scalar(select(DeliveryRow.id).where(*_due()).limit(1)) is not None


def claim_due(session: Session, limit: int) -> list[Parcel]:
    """Take messages that are due, the longest waiting first: one at a time for each endpoint, few for each owner."""
    going_on = (DeliveryRow.state == PENDING, DeliveryRow.lease_until >= db_now())
    busy = session.execute(select(DeliveryRow.webhook_id, DeliveryRow.owner).where(*going_on)).all()
    owners = [owner for _, owner in busy]
    place = func.row_number().over(
        partition_by=DeliveryRow.webhook_id, order_by=(DeliveryRow.due_at, DeliveryRow.created_at, DeliveryRow.id)
    )
    idle = DeliveryRow.webhook_id.not_in([webhook_id for webhook_id, _ in busy])
    ranked = select(DeliveryRow.id, place.label("place")).where(*_due(), idle).subquery()
    query = (
        select(DeliveryRow, WebhookRow, db_now())
        .join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
        .where(*_due(), DeliveryRow.id.in_(select(ranked.c.id).where(ranked.c.place == 1)))
        .order_by(DeliveryRow.due_at, DeliveryRow.created_at, DeliveryRow.id)
        .limit(MAX_LOOKED_AT)
        .with_for_update(of=DeliveryRow, skip_locked=True)
    )
    parcels: list[Parcel] = []
    for delivery, endpoint, now in session.execute(query).all():
        if delivery.num_attempts >= MAX_ATTEMPTS:  # the sender died in the last one
            _finish(delivery, FAILED)
        elif len(parcels) < limit and owners.count(endpoint.owner) < MAX_AT_ONCE_PER_OWNER:
            owners.append(endpoint.owner)
            delivery.num_attempts += 1
            delivery.lease_until = db_now(LEASE_SECONDS)
            parcels.append(_pack(delivery, endpoint, now))
    session.flush()
    return parcels


def record_outcome(session: Session, parcel: Parcel, outcome: Outcome) -> None:
    """Write down what came of an attempt, and when the next one is. An attempt that was overtaken changes nothing."""
    delivery = session.scalar(select(DeliveryRow).where(DeliveryRow.id == parcel.delivery_id).with_for_update())
    if delivery is None or delivery.state != PENDING or delivery.num_attempts != parcel.num_attempts:
        return
    now = session.scalar(select(db_now()))
    assert now is not None
    attempt = {
        "at": now.astimezone(UTC).isoformat(timespec="milliseconds"),
        "status": outcome.status,
        "error": outcome.error,
        "milliseconds": outcome.milliseconds,
    }
    delivery.attempts = [*delivery.attempts, attempt][-MAX_KEPT_ATTEMPTS:]
    delivery.lease_until = None
    if outcome.is_delivered:
        _finish(delivery, DELIVERED)
    elif outcome.status == HTTP_GONE:
        _finish(delivery, FAILED)
        endpoint = session.get(WebhookRow, parcel.webhook_id)
        assert endpoint is not None, "its deliveries go with it"
        disable(session, endpoint, GONE)
    elif delivery.num_attempts >= MAX_ATTEMPTS:
        _finish(delivery, FAILED)
    else:
        delivery.due_at = db_now(choose_pause(delivery.num_attempts, outcome.retry_after_seconds))
    session.flush()


def choose_pause(num_attempts: int, retry_after_seconds: float | None) -> float:
    """Return the seconds to the next attempt: the schedule's, or what the receiver asks for where that is longer."""
    scheduled = PAUSES_SECONDS[num_attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(scheduled, min(retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS))


def deliver_one(database: Database, send: Callable[[Parcel], Outcome], parcel: Parcel) -> None:
    """Make one attempt for a message that was claimed."""
    outcome = send(parcel)
    with database.session() as session:
        record_outcome(session, parcel, outcome)


def send_test(session: Session, owner: str, webhook_id: str) -> DeliveryRow:
    """Write a message that tells of nothing."""
    endpoint = _require_enabled(get_endpoint(session, owner, webhook_id))
    now = session.scalar(select(db_now()))
    assert now is not None
    return _refreshed(session, add_delivery(session, endpoint, TEST, now, {"webhook_id": endpoint.id}))


def get_delivery(
    session: Session, owner: str, webhook_id: str, delivery_id: str, *, for_update: bool = False
) -> DeliveryRow:
    """Return a message to an endpoint of this owner. `for_update` locks it until the transaction ends."""
    get_endpoint(session, owner, webhook_id)
    mine = (DeliveryRow.id == delivery_id, DeliveryRow.webhook_id == webhook_id, DeliveryRow.owner == owner)
    query = select(DeliveryRow).where(*mine)
    delivery = session.scalar(query.with_for_update() if for_update else query)
    if delivery is None:
        raise NotFound(f"there is no delivery {delivery_id} of webhook {webhook_id}")
    return delivery


def redeliver(session: Session, owner: str, webhook_id: str, delivery_id: str) -> DeliveryRow:
    """Send a message again with the same id, on a fresh schedule; one that is waiting is sent at once."""
    delivery = get_delivery(session, owner, webhook_id, delivery_id, for_update=True)
    _require_enabled(get_endpoint(session, owner, webhook_id))
    if delivery.lease_until is None:
        delivery.state, delivery.num_attempts, delivery.due_at, delivery.finished_at = PENDING, 0, db_now(), None
    return _refreshed(session, delivery)


def forget_deliveries(session: Session, older_than_seconds: float, limit: int = 1000) -> int:
    """Remove messages whose last attempt is long ago; return how many."""
    old = select(DeliveryRow.id).where(DeliveryRow.finished_at < db_now(-older_than_seconds)).limit(limit)
    gone = session.scalars(delete(DeliveryRow).where(DeliveryRow.id.in_(old)).returning(DeliveryRow.id))
    return len(gone.all())


def _due() -> tuple[ColumnElement[bool], ...]:
    free = or_(DeliveryRow.lease_until.is_(None), DeliveryRow.lease_until < db_now())
    return (DeliveryRow.state == PENDING, DeliveryRow.due_at <= db_now(), free)


def _pack(delivery: DeliveryRow, endpoint: WebhookRow, now: datetime) -> Parcel:
    old = endpoint.old_secret if endpoint.old_secret_until is not None and endpoint.old_secret_until > now else None
    return Parcel(
        delivery_id=delivery.id,
        webhook_id=endpoint.id,
        num_attempts=delivery.num_attempts,
        url=endpoint.url,
        body=delivery.body,
        secrets=(endpoint.secret, *([old] if old else ())),
    )


def _finish(delivery: DeliveryRow, state: str) -> None:
    delivery.state = state
    delivery.due_at = None
    delivery.lease_until = None
    delivery.finished_at = db_now()


def _require_enabled(endpoint: WebhookRow) -> WebhookRow:
    if endpoint.disabled_reason is not None:
        raise Conflict(
            f"webhook {endpoint.id} is disabled: {endpoint.disabled_reason}",
            code="webhook_disabled",
            fix='Enable it first: PATCH it with {"enabled": true}.',
        )
    return endpoint


def _refreshed(session: Session, delivery: DeliveryRow) -> DeliveryRow:
    session.flush()
    session.refresh(delivery)
    return delivery
