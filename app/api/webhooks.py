"""Webhooks: endpoints that hear what happens to jobs, and the messages to them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict
from sqlalchemy import select

from app.api.cursors import Cursor, Limit, read_page
from app.api.openapi import CREATED, problems
from app.api.owner import Owner
from app.api.service import Parts, Service
from app.api.webhook_views import (
    DeliveryPage,
    DeliveryView,
    WebhookPage,
    WebhookSecretView,
    WebhookView,
    describe_delivery,
    describe_webhook,
    show_secret,
)
from app.db.tables import DeliveryRow, WebhookRow
from app.recipes.base import Items, Spec
from app.webhooks.addresses import MAX_URL_CHARACTERS, Destinations
from app.webhooks.announce import JobEvent
from app.webhooks.deliveries import get_delivery, redeliver, send_test
from app.webhooks.endpoints import (
    change_endpoint,
    create_endpoint,
    delete_endpoint,
    get_endpoint,
    require_destination,
    rotate_secret,
)

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

WebhookId = Annotated[
    str, Path(pattern=r"^whk_[a-z0-9]{26}$", description="The webhook.", examples=["whk_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]
DeliveryId = Annotated[
    str, Path(pattern=r"^msg_[a-z0-9]{26}$", description="The message.", examples=["msg_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL_CHARACTERS)]
Description = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=200)]
Events = Annotated[Items[JobEvent], Field(min_length=1, max_length=8)]
MAX_OVERLAP_SECONDS = 7 * 24 * 3600

EXAMPLE: JsonDict = {"url": "https://example.com/pare", "events": ["job.succeeded", "job.failed"]}


class WebhookRequest(Spec):
    """An endpoint of yours."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    url: Url
    """Where messages are sent: https to a public address, unless the operator allows more."""
    description: Description = ""
    """Your note."""
    events: Events = ("job.succeeded", "job.failed", "job.cancelled")
    """What it hears of."""
    jobs: Literal["all", "named"] = "all"
    """all: of every job of yours. named: of those submitted with its `webhook_id`."""


class WebhookChange(Spec):
    """What to change; fields that are left out stay."""

    url: Url = ""
    """Where messages are sent, waiting ones too."""
    description: Description = ""
    """Your note."""
    events: Events = ()
    """What it hears of."""
    jobs: Literal["all", "named"] = "all"
    """Of which jobs."""
    enabled: bool = True
    """False: nothing more is sent, and what waits is given up."""


@router.post(
    "",
    operation_id="create_webhook",
    status_code=201,
    responses={201: CREATED, **problems(400, 409, 413, 415, 422)},
)
def post_webhook(response: Response, service: Parts, owner: Owner, body: WebhookRequest) -> WebhookSecretView:
    """Create a webhook. Its secret is in this answer and in no other."""
    require_destination(_destinations(service), body.url)
    with service.database.session() as session:
        endpoint = create_endpoint(
            session, owner=owner, url=body.url, description=body.description, events=body.events, jobs=body.jobs
        )
    view = show_secret(endpoint)
    response.headers["Location"] = view.links.self
    return view


@router.get("", operation_id="list_webhooks", responses=problems(400, 422))
def list_webhooks(service: Parts, owner: Owner, cursor: Cursor = None, limit: Limit = 50) -> WebhookPage:
    """List webhooks, newest first."""
    with service.database.read() as session:
        rows, next_cursor = read_page(session, WebhookRow, owner, cursor, limit)
        return WebhookPage(items=[describe_webhook(row) for row in rows], next_cursor=next_cursor)


@router.get("/{webhook_id}", operation_id="get_webhook", responses=problems(404))
def get_webhook(service: Parts, owner: Owner, webhook_id: WebhookId) -> WebhookView:
    """Show one webhook."""
    with service.database.read() as session:
        return describe_webhook(get_endpoint(session, owner, webhook_id))


@router.patch("/{webhook_id}", operation_id="change_webhook", responses=problems(400, 404, 409, 413, 415, 422))
def patch_webhook(service: Parts, owner: Owner, webhook_id: WebhookId, body: WebhookChange) -> WebhookView:
    """Change a webhook, or enable one that was disabled."""
    changes = {name: getattr(body, name) for name in body.model_fields_set}
    if "url" in changes:
        require_destination(_destinations(service), body.url)
    if "events" in changes:
        changes["events"] = list(body.events)
    with service.database.session() as session:
        return describe_webhook(change_endpoint(session, owner, webhook_id, changes))


@router.delete("/{webhook_id}", operation_id="delete_webhook", status_code=204, responses=problems(404))
def remove_webhook(service: Parts, owner: Owner, webhook_id: WebhookId) -> None:
    """Delete a webhook with its messages; those not yet delivered are never sent."""
    with service.database.session() as session:
        delete_endpoint(session, owner, webhook_id)


@router.post("/{webhook_id}/rotate", operation_id="rotate_webhook_secret", responses=problems(404, 422))
def post_rotation(
    service: Parts,
    owner: Owner,
    webhook_id: WebhookId,
    overlap_seconds: Annotated[
        int,
        Query(
            ge=0,
            le=MAX_OVERLAP_SECONDS,
            description="For so long messages carry a signature with the old secret as well; 0: it was stolen.",
        ),
    ] = 24 * 3600,
) -> WebhookSecretView:
    """Give a webhook a new secret. It is in this answer and in no other."""
    with service.database.session() as session:
        return show_secret(rotate_secret(session, owner, webhook_id, overlap_seconds))


@router.post("/{webhook_id}/test", operation_id="test_webhook", status_code=202, responses=problems(404, 409))
def post_test(service: Parts, owner: Owner, webhook_id: WebhookId) -> DeliveryView:
    """Send a message of type webhook.test; what comes of it is in the answer's `links.self`."""
    with service.database.session() as session:
        return describe_delivery(send_test(session, owner, webhook_id))


@router.get("/{webhook_id}/deliveries", operation_id="list_deliveries", responses=problems(400, 404, 422))
def list_deliveries(
    service: Parts, owner: Owner, webhook_id: WebhookId, cursor: Cursor = None, limit: Limit = 50
) -> DeliveryPage:
    """List the messages to a webhook with every attempt, newest first."""
    with service.database.read() as session:
        get_endpoint(session, owner, webhook_id)
        query = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
        rows, next_cursor = read_page(session, DeliveryRow, owner, cursor, limit, query)
        return DeliveryPage(items=[describe_delivery(row) for row in rows], next_cursor=next_cursor)


@router.get("/{webhook_id}/deliveries/{delivery_id}", operation_id="get_delivery", responses=problems(404))
def show_delivery(service: Parts, owner: Owner, webhook_id: WebhookId, delivery_id: DeliveryId) -> DeliveryView:
    """Show one message with every attempt."""
    with service.database.read() as session:
        return describe_delivery(get_delivery(session, owner, webhook_id, delivery_id))


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    operation_id="redeliver_webhook",
    status_code=202,
    responses=problems(404, 409),
)
def post_redelivery(service: Parts, owner: Owner, webhook_id: WebhookId, delivery_id: DeliveryId) -> DeliveryView:
    """Send a message again, with the same id: at once, and on a fresh schedule if that fails."""
    with service.database.session() as session:
        return describe_delivery(redeliver(session, owner, webhook_id, delivery_id))


def _destinations(service: Service) -> Destinations:
    return Destinations(service.settings)
