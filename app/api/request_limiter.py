"""Requests per minute of each owner. The count is the database's; this process serves from blocks that it took there.

Where the database is away or slow, a process goes on with a block of its own every five seconds: an owner is then let
in more slowly rather than not at all, and requests that need the database say themselves that it is away.
"""

import asyncio
import math
import time
from dataclasses import dataclass

import structlog
from starlette.concurrency import run_in_threadpool

from app.access.limits import read_limits
from app.access.windows import WINDOW_SECONDS, take_block
from app.db.session import Database
from app.errors import PareError, QuotaExceeded
from app.settings import Settings

POLICY = "requests"
BLOCKS_PER_WINDOW = 20
TAKE_SECONDS = 1.0
"""The database is given this long; whoever waits for a block is a request."""
ALONE_SECONDS = 5.0
LOOK_AGAIN_SECONDS = 10.0
"""How long an owner without a limit is taken to have none."""
MAX_OWNERS = 10_000

log = structlog.get_logger(__name__)


@dataclass
class _Share:
    """What this process may let through for an owner."""

    limit: int | None
    left: int
    untaken: int
    ends_at: float
    reset_at: float

    def has_run_out(self) -> bool:
        """Whether the database has to be asked before the next request."""
        over = time.monotonic() >= self.ends_at
        return over or (self.limit is not None and not self.left and self.untaken > 0)


class RequestLimiter:
    """Lets requests through, for one API process. Its methods run on the event loop."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._shares: dict[str, _Share] = {}
        self._taking: dict[str, asyncio.Lock] = {}

    async def take(self, owner: str) -> tuple[dict[str, str], QuotaExceeded | None]:
        """Count a request; return the headers that tell the limit, and the refusal where there is no more."""
        share = self._shares.get(owner)
        while share is None or share.has_run_out():
            share = await self._take_share(owner)
        if share.limit is None:
            return {}, None
        if share.left:
            share.left -= 1
            return _describe(share), None
        seconds = max(0.0, share.reset_at - time.monotonic())
        detail = f"{share.limit} requests per minute are allowed"
        return _describe(share), QuotaExceeded(POLICY, detail, retry_after_seconds=seconds)

    def forget(self, owner: str) -> None:
        """Read this owner's limit again, because it was changed."""
        self._shares.pop(owner, None)

    async def _take_share(self, owner: str) -> _Share:
        async with self._taking.setdefault(owner, asyncio.Lock()):
            share = self._shares.get(owner)
            if share is not None and not share.has_run_out():
                return share  # another request has just asked
            asking = asyncio.ensure_future(run_in_threadpool(self._try_ask, owner))
            # Not cancelled when it takes long: a thread cannot be.
            await asyncio.wait({asking}, timeout=TAKE_SECONDS)
            share = asking.result() if asking.done() else None
            if share is None:
                log.warning("requests are counted by this process alone")
                share = self._go_alone()
            if len(self._shares) >= MAX_OWNERS:
                self._shares.clear()
            self._shares[owner] = share
            return share

    def _try_ask(self, owner: str) -> _Share | None:
        try:
            return self._ask(owner)
        except PareError:
            return None

    def _ask(self, owner: str) -> _Share:
        with self._database.read() as session:
            limit = read_limits(session, self._settings, owner).requests_per_minute
        asked_at = time.monotonic()
        if limit is None:
            return _Share(None, 0, 0, asked_at + LOOK_AGAIN_SECONDS, asked_at)
        with self._database.session() as session:
            block = take_block(session, owner, limit, max(1, limit // BLOCKS_PER_WINDOW))
        reset_at = asked_at + block.seconds_left
        return _Share(limit, block.granted, block.untaken, reset_at, reset_at)

    def _go_alone(self) -> _Share:
        limit, now = self._settings.quota_requests_per_minute, time.monotonic()
        if limit is None:
            return _Share(None, 0, 0, now + ALONE_SECONDS, now)
        return _Share(limit, max(1, limit // BLOCKS_PER_WINDOW), 0, now + ALONE_SECONDS, now + ALONE_SECONDS)


def _describe(share: _Share) -> dict[str, str]:
    """Return the fields of draft-ietf-httpapi-ratelimit-headers-10."""
    seconds = max(1, math.ceil(share.reset_at - time.monotonic()))
    return {
        "RateLimit-Policy": f'"{POLICY}";q={share.limit};w={WINDOW_SECONDS}',
        "RateLimit": f'"{POLICY}";r={share.left + share.untaken};t={seconds}',
    }
