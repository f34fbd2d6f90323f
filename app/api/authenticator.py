"""Recognizes callers by their keys, and notices within seconds that a key ended."""

import asyncio
import hmac
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import structlog
from starlette.concurrency import run_in_threadpool

from app.access.keys import LOCAL_CALLER, Caller, authenticate, is_live, note_use
from app.access.tokens import Token, parse_token
from app.api.throttle import BadKeyThrottle
from app.db.session import Database
from app.errors import NotAuthenticated, PareError, TooManyRequests, Unavailable
from app.settings import Settings

RECHECK_SECONDS = 2.0
"""A key is looked up again when the last look is longer ago: so long does a revoked one go on at most."""
MAX_REMEMBERED = 10_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Seen:
    caller: Caller
    digest: str
    looked_at: float


class Authenticator:
    """Who may come in, for one API process. Its methods run on the event loop; the database is asked in threads."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._local = settings.auth == "local"
        self._environment = settings.key_environment
        self._database = database
        self._seen: dict[str, _Seen] = {}
        self._throttle = BadKeyThrottle()
        # Whoever sends bad keys that look good costs a look into the database each: one at a time.
        self._suspects = asyncio.Semaphore(1)

    async def admit(self, authorization: str | None, address: str) -> Caller:
        """Return who sends a request with this Authorization header; raises NotAuthenticated or TooManyRequests."""
        if self._local:
            return LOCAL_CALLER
        if authorization is None:
            raise NotAuthenticated("the request has no key", code="key_missing")
        try:
            token = parse_token(_read_bearer(authorization), self._environment)
            return self._remember(token) or await self._look_up(token, address)
        except NotAuthenticated as error:
            self._throttle.note(address)
            wait_seconds = self._throttle.wait_seconds(address)
            log.warning("bad key", address=address, detail=error.detail)
            if wait_seconds:
                detail = "too many bad keys came from this address"
                raise TooManyRequests(detail, wait_seconds, code="too_many_bad_keys") from None
            raise

    async def still_admits(self, caller: Caller) -> bool:
        """Return whether a caller's key is valid still; where the database is away, that is not for us to say."""
        if caller.key_id is None:
            return True
        seen = self._seen.get(caller.key_id)
        if seen is not None and _is_fresh(seen):
            return True
        try:
            lives = await run_in_threadpool(self._is_live, caller.key_id)
        except Unavailable:
            return True
        if not lives:
            self.forget(caller.key_id)
        elif seen is not None:
            self._seen[caller.key_id] = _Seen(seen.caller, seen.digest, time.monotonic())
        return lives

    def forget(self, key_id: str) -> None:
        """Look this key up the next time, because it was changed."""
        self._seen.pop(key_id, None)

    def _remember(self, token: Token) -> Caller | None:
        seen = self._seen.get(token.key_id)
        if seen is not None and _is_fresh(seen) and hmac.compare_digest(seen.digest, token.digest):
            return seen.caller
        return None

    async def _look_up(self, token: Token, address: str) -> Caller:
        async with self._suspects if self._throttle.wait_seconds(address) else nullcontext():
            looked_at = time.monotonic()  # before the look: a key that ends meanwhile is not taken for looked up since
            caller = await run_in_threadpool(self._authenticate, token)
        if len(self._seen) >= MAX_REMEMBERED:
            self._seen.clear()
        self._seen[token.key_id] = _Seen(caller, token.digest, looked_at)
        return caller

    def _authenticate(self, token: Token) -> Caller:
        with self._database.read() as session:
            caller, idle = authenticate(session, token)
        if idle:
            # A note for people: no reason to refuse anybody.
            with suppress(PareError), self._database.session() as session:
                note_use(session, token.key_id)
        return caller

    def _is_live(self, key_id: str) -> bool:
        with self._database.read() as session:
            return is_live(session, key_id)


def _is_fresh(seen: _Seen) -> bool:
    return time.monotonic() - seen.looked_at < RECHECK_SECONDS


def _read_bearer(authorization: str) -> str:
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise NotAuthenticated("the Authorization header is not `Bearer pare_...`")
    return text.strip(" ")
