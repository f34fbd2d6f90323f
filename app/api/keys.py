"""Keys: made, listed, rotated and revoked by administrators, over all owners."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from app.access.keys import (
    MAX_GRACE_SECONDS,
    OWNER_NAME,
    Scope,
    create_key,
    get_key,
    revoke_key,
    rotate_key,
)
from app.api.cursors import Cursor, Limit, read_page
from app.api.openapi import CREATED, problems
from app.api.service import Parts
from app.api.views import SelfLink, View
from app.db.access_tables import KeyRow
from app.recipes.base import Items, Spec

router = APIRouter(prefix="/v1/keys", tags=["access"])

KeyId = Annotated[
    str, Path(pattern=r"^key_[a-z0-9]{26}$", description="The key.", examples=["key_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]
MAX_LIFETIME_SECONDS = 10 * 365 * 24 * 3600
Lifetime = Annotated[int, Field(ge=1, le=MAX_LIFETIME_SECONDS)]
Grace = Annotated[int, Field(ge=0, le=MAX_GRACE_SECONDS)]
EXAMPLE: JsonDict = {"owner": "vision-team", "name": "nightly builds", "scopes": ["read", "write"]}


class KeyRequest(Spec):
    """A request for a key."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    owner: str = Field(pattern=f"^{OWNER_NAME}$")
    """Whose things it opens; an owner needs no other registration."""
    name: str = Field(
        "key", min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+$"
    )
    """A note for the list."""
    scopes: Items[Scope] = Field(("read", "write"), min_length=1, max_length=3)
    """read: look and download. write: upload, submit, cancel, delete. admin: keys, limits and the audit log of all."""
    expires_in_seconds: Lifetime | None = None
    """How long it lives; null: until it is revoked."""


class RotateRequest(Spec):
    """How to replace a key."""

    grace_seconds: Grace = 24 * 3600
    """How long the old key goes on beside the new one; 0: it ends now."""
    expires_in_seconds: Lifetime | None = None
    """How long the new one lives; null: as long as the old one was meant to."""


class KeyView(View):
    """A key, without its secret."""

    id: str
    """Names the key."""
    owner: str
    """Whose things it opens."""
    name: str
    """The note that it was made with."""
    scopes: list[Scope]
    """What it may do."""
    created_at: datetime
    """When it was made."""
    expires_at: datetime | None
    """When it ends by itself; null: never."""
    revoked_at: datetime | None
    """When it was revoked; null: it was not."""
    last_used_at: datetime | None
    """When it was last used, within a minute."""
    replaced_by: str | None
    """The key that was made to take its place."""
    links: SelfLink
    """Where to find it."""


class NewKeyView(View):
    """A key with its text, which is shown only here."""

    key: KeyView
    """The key."""
    token: str
    """The text to send: `Authorization: Bearer <token>`. Pare does not have it and cannot show it again."""


class KeyPage(View):
    """One page of keys, newest first."""

    items: list[KeyView]
    """The keys, those that ended included."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


@router.post("", operation_id="create_key", status_code=201, responses={201: CREATED, **problems(400, 422)})
def post_key(service: Parts, response: Response, body: KeyRequest) -> NewKeyView:
    """Make a key. Its text is in this answer and nowhere else."""
    with service.database.session() as session:
        row, token = create_key(
            session,
            environment=service.settings.key_environment,
            owner=body.owner,
            name=body.name,
            scopes=body.scopes,
            expires_in_seconds=body.expires_in_seconds,
        )
        return _answer_new(response, row, token)


@router.get("", operation_id="list_keys", responses=problems(400, 422))
def list_keys(
    service: Parts,
    cursor: Cursor = None,
    limit: Limit = 50,
    owner: Annotated[str | None, Query(pattern=f"^{OWNER_NAME}$", description="Only the keys of this owner.")] = None,
) -> KeyPage:
    """List the keys of all owners, newest first."""
    with service.database.read() as session:
        rows, next_cursor = read_page(session, KeyRow, owner, cursor, limit)
        return KeyPage(items=describe_keys(rows), next_cursor=next_cursor)


@router.get("/{key_id}", operation_id="get_key", responses=problems(404))
def show_key(service: Parts, key_id: KeyId) -> KeyView:
    """Show one key."""
    with service.database.read() as session:
        return describe_key(get_key(session, key_id))


@router.post(
    "/{key_id}/rotate",
    operation_id="rotate_key",
    status_code=201,
    responses={201: CREATED, **problems(400, 404, 409, 422)},
)
def post_rotation(service: Parts, response: Response, key_id: KeyId, body: RotateRequest) -> NewKeyView:
    """Make a key that takes the place of this one. Both are valid for the time of grace."""
    with service.database.session() as session:
        row, token = rotate_key(
            session,
            environment=service.settings.key_environment,
            key_id=key_id,
            grace_seconds=body.grace_seconds,
            expires_in_seconds=body.expires_in_seconds,
        )
        answer = _answer_new(response, row, token)
    service.authenticator.forget(key_id)
    return answer


@router.delete("/{key_id}", operation_id="revoke_key", status_code=204, responses=problems(404))
def remove_key(service: Parts, key_id: KeyId) -> None:
    """Revoke a key: within seconds it opens nothing, and requests that are in progress with it end."""
    with service.database.session() as session:
        revoke_key(session, key_id)
    service.authenticator.forget(key_id)


def describe_keys(rows: Sequence[KeyRow]) -> list[KeyView]:
    """Return what administrators see of rows."""
    return [describe_key(row) for row in rows]


def describe_key(row: KeyRow) -> KeyView:
    """Return what administrators, and its holder, see of a row."""
    return KeyView.model_validate(
        {
            "id": row.id,
            "owner": row.owner,
            "name": row.name,
            "scopes": row.scopes,
            "created_at": row.created_at,
            "expires_at": row.expires_at,
            "revoked_at": row.revoked_at,
            "last_used_at": row.last_used_at,
            "replaced_by": row.replaced_by,
            "links": {"self": f"/v1/keys/{row.id}"},
        }
    )


def _answer_new(response: Response, row: KeyRow, token: str) -> NewKeyView:
    key = describe_key(row)
    response.headers["Location"] = key.links.self
    return NewKeyView(key=key, token=token)
