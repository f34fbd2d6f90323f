"""Webhooks: endpoints of yours that hear what happens to jobs, and the check that a message is genuine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pare.errors import WebhookInvalid
from pare.records import read
from pare.resources import pages
from pare.transport import Transport


@dataclass(frozen=True)
class Webhook:
    """An endpoint that hears what happens to jobs."""

    id: str
    url: str
    description: str
    events: tuple[str, ...]
    jobs: str
    enabled: bool
    created_at: str
    disabled_reason: str | None = None
    old_secret_until: str | None = None
    secret: str | None = field(default=None, repr=False)
    """After `create` and `rotate` alone."""
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class DeliveryAttempt:
    """One attempt to deliver a message."""

    at: str
    status: int | None
    error: str | None
    milliseconds: int


@dataclass(frozen=True)
class Delivery:
    """A message to a webhook."""

    id: str
    type: str
    job_id: str | None
    body: str
    state: str
    attempts: tuple[DeliveryAttempt, ...]
    created_at: str
    next_attempt_at: str | None = None
    finished_at: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


class Webhooks:
    """Endpoints of yours."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self, url: str, *, events: Sequence[str] | None = None, jobs: str | None = None, description: str | None = None
    ) -> Webhook:
        """Create a webhook. Its `.secret` is told this once: the receiver needs it to verify messages.

        `jobs` is "all" (every job of yours) or "named" (those submitted with its id).
        """
        body = {"url": url, "events": events, "jobs": jobs, "description": description}
        return read(Webhook, self._transport.request("POST", "/v1/webhooks", json=_given(body)).json())

    def get(self, id: str) -> Webhook:
        """Return one webhook."""
        return read(Webhook, self._transport.get(f"/v1/webhooks/{id}"))

    def list(self, *, limit: int = 100) -> tuple[Webhook, ...]:
        """Return the newest webhooks."""
        return tuple(read(Webhook, item) for item in pages(self._transport, "/v1/webhooks", limit))

    def change(
        self,
        id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        jobs: str | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given."""
        body = {"url": url, "events": events, "jobs": jobs, "description": description, "enabled": enabled}
        return read(Webhook, self._transport.request("PATCH", f"/v1/webhooks/{id}", json=_given(body)).json())

    def rotate(self, id: str, *, overlap_seconds: int | None = None) -> Webhook:
        """Give a webhook a new `.secret`. For the overlap (default: a day) the old one verifies as well."""
        params = {"overlap_seconds": overlap_seconds}
        return read(Webhook, self._transport.request("POST", f"/v1/webhooks/{id}/rotate", params=params).json())

    def test(self, id: str) -> Delivery:
        """Send a message that tells of nothing."""
        return read(Delivery, self._transport.request("POST", f"/v1/webhooks/{id}/test").json())

    def deliveries(self, id: str, *, limit: int = 100) -> tuple[Delivery, ...]:
        """Return the newest messages with what came of each attempt."""
        return tuple(read(Delivery, item) for item in pages(self._transport, f"/v1/webhooks/{id}/deliveries", limit))

    def delivery(self, id: str, delivery_id: str) -> Delivery:
        """Return one message."""
        return read(Delivery, self._transport.get(f"/v1/webhooks/{id}/deliveries/{delivery_id}"))

    def redeliver(self, id: str, delivery_id: str) -> Delivery:
        """Send a message again, with the same id."""
        path = f"/v1/webhooks/{id}/deliveries/{delivery_id}/redeliver"
        return read(Delivery, self._transport.request("POST", path, repeatable=True).json())

    def delete(self, id: str) -> None:
        """Delete a webhook with its messages."""
        self._transport.request("DELETE", f"/v1/webhooks/{id}")


def verify_webhook(secret: str, headers: Mapping[str, str], body: bytes | str) -> dict[str, Any]:
    """Return the message in a request, or raise WebhookInvalid. For receivers; needs nothing but this package.

    The signature is compared in constant time, and a message from more than five minutes ago (or ahead) is refused.
    `body` is the request's, byte for byte. Remember the header `webhook-id` for a day: a message can come twice.
    """
    from standardwebhooks.webhooks import Webhook as Verifier
    from standardwebhooks.webhooks import WebhookVerificationError

    try:
        message = Verifier(secret).verify(body, dict(headers))
    except WebhookVerificationError as error:
        raise WebhookInvalid(str(error)) from None
    except ValueError as error:  # of text, base64 or JSON that is none
        raise WebhookInvalid(f"the message or its signature cannot be read ({type(error).__name__})") from None
    if not isinstance(message, dict):
        raise WebhookInvalid("the message is no JSON object")
    return message


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}
