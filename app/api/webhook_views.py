"""What the user sees of webhooks and of the messages to them."""

from datetime import datetime
from typing import Literal

from app.api.views import View
from app.db.tables import DeliveryRow, WebhookRow
from app.webhooks.announce import JobEvent


class WebhookLinks(View):
    """Where to find what belongs to a webhook."""

    self: str
    """The webhook."""
    deliveries: str
    """The messages to it."""


class WebhookView(View):
    """An endpoint that hears what happens to jobs."""

    id: str
    """Names the webhook."""
    url: str
    """Where messages are sent."""
    description: str
    """Your note."""
    events: list[JobEvent]
    """What it hears of."""
    jobs: Literal["all", "named"]
    """all: of every job of yours. named: of those submitted with its `webhook_id`."""
    enabled: bool
    """Whether messages are sent."""
    disabled_reason: Literal["by_owner", "gone"] | None
    """by_owner: you disabled it. gone: it answered 410."""
    old_secret_until: datetime | None
    """Until when messages are signed with the secret before the last rotation as well."""
    created_at: datetime
    """When it was created."""
    links: WebhookLinks
    """Related URL paths."""


class WebhookSecretView(WebhookView):
    """A webhook with its secret, which is shown this once."""

    secret: str
    """Verifies signatures (Standard Webhooks); keep it where the receiver reads it."""


class WebhookPage(View):
    """One page of webhooks, newest first."""

    items: list[WebhookView]
    """The webhooks."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


class DeliveryAttemptView(View):
    """One attempt to deliver a message."""

    at: datetime
    """When it was over."""
    status: int | None
    """The HTTP status of the answer; 2xx means delivered."""
    error: Literal["destination_refused", "timeout", "tls_failed", "connection_failed", "bad_answer"] | None
    """Why there is no status."""
    milliseconds: int
    """How long it took."""


class DeliveryLinks(View):
    """Where to find what belongs to a message."""

    self: str
    """The message."""
    webhook: str
    """Where it goes."""
    redeliver: str
    """POST here to send it again."""
    job: str | None
    """The job that it tells of."""


class DeliveryView(View):
    """A message to a webhook."""

    id: str
    """The `webhook-id` header: the same in every attempt."""
    type: str
    """What it tells of, for example job.succeeded."""
    job_id: str | None
    """The job that it tells of."""
    body: str
    """What is sent."""
    state: Literal["pending", "delivered", "failed"]
    """pending: there will be another attempt."""
    attempts: list[DeliveryAttemptView]
    """What came of each attempt, oldest first; of very many the newest."""
    next_attempt_at: datetime | None
    """When it is tried next."""
    created_at: datetime
    """When what it tells of happened."""
    finished_at: datetime | None
    """When it was delivered or given up."""
    links: DeliveryLinks
    """Related URL paths."""


class DeliveryPage(View):
    """One page of messages, newest first."""

    items: list[DeliveryView]
    """The messages."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


def describe_webhook(row: WebhookRow) -> WebhookView:
    """Return what the user sees of an endpoint, whenever it is looked at."""
    return WebhookView.model_validate(_webhook_fields(row))


def show_secret(row: WebhookRow) -> WebhookSecretView:
    """Return what the user sees of an endpoint when it gets a secret."""
    return WebhookSecretView.model_validate(_webhook_fields(row) | {"secret": row.secret})


def describe_delivery(row: DeliveryRow) -> DeliveryView:
    """Return what the user sees of a message."""
    webhook = f"/v1/webhooks/{row.webhook_id}"
    own = f"{webhook}/deliveries/{row.id}"
    return DeliveryView.model_validate(
        {
            "id": row.id,
            "type": row.type,
            "job_id": row.job_id,
            "body": row.body,
            "state": row.state,
            "attempts": row.attempts,
            "next_attempt_at": row.due_at,
            "created_at": row.created_at,
            "finished_at": row.finished_at,
            "links": {
                "self": own,
                "webhook": webhook,
                "redeliver": f"{own}/redeliver",
                "job": f"/v1/jobs/{row.job_id}" if row.job_id else None,
            },
        }
    )


def _webhook_fields(row: WebhookRow) -> dict[str, object]:
    own = f"/v1/webhooks/{row.id}"
    return {
        "id": row.id,
        "url": row.url,
        "description": row.description,
        "events": row.events,
        "jobs": row.jobs,
        "enabled": row.disabled_reason is None,
        "disabled_reason": row.disabled_reason,
        "old_secret_until": row.old_secret_until,
        "created_at": row.created_at,
        "links": {"self": own, "deliveries": f"{own}/deliveries"},
    }
