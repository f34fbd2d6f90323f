"""Keys of a service, for its administrators."""

from typing import Any

from pare.records import Key, read
from pare.resources import pages
from pare.transport import Transport


class Keys:
    """Who may come in, and what they may do."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        owner: str,
        *,
        name: str | None = None,
        scopes: tuple[str, ...] = ("read", "write"),
        expires_in_seconds: int | None = None,
    ) -> tuple[Key, str]:
        """Make a key; return it and its text, which the service shows only now."""
        body: dict[str, Any] = {"owner": owner, "scopes": list(scopes), "expires_in_seconds": expires_in_seconds}
        if name is not None:
            body["name"] = name
        return self._read_new(self._transport.request("POST", "/v1/keys", json=body).json())

    def list(self, *, owner: str | None = None, limit: int = 100) -> tuple[Key, ...]:
        """Return the newest keys, of one owner or of all."""
        return tuple(read(Key, item) for item in pages(self._transport, "/v1/keys", limit, owner=owner))

    def get(self, id: str) -> Key:
        """Return one key."""
        return read(Key, self._transport.get(f"/v1/keys/{id}"))

    def rotate(self, id: str, *, grace_seconds: int | None = None) -> tuple[Key, str]:
        """Make a key that takes the place of another, which goes on for a while (a day; 0: it ends now)."""
        body = {} if grace_seconds is None else {"grace_seconds": grace_seconds}
        return self._read_new(self._transport.request("POST", f"/v1/keys/{id}/rotate", json=body).json())

    def revoke(self, id: str) -> None:
        """End a key within seconds."""
        self._transport.request("DELETE", f"/v1/keys/{id}")

    def _read_new(self, answer: dict[str, Any]) -> tuple[Key, str]:
        return read(Key, answer["key"]), str(answer["token"])
