"""The one place where requests get in: every path but the public ones needs a key with the scope of what is asked.

It decides by the path and the method alone, before the body is read and before the router looks, so that a new route
is closed until its caller is known. A request that goes on for long (an upload, an event stream, a download) ends
when its key does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.keys import Caller
from app.access.keys import Scope as KeyScope
from app.api.authenticator import RECHECK_SECONDS, Authenticator
from app.api.owner import CALLER
from app.api.problems import answer_error
from app.api.recorder import Recorder
from app.api.request_limiter import RequestLimiter
from app.errors import Forbidden, NotAuthenticated, PareError

PUBLIC_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json"})
"""They tell nothing of anybody's."""
ADMIN_PATHS = ("/v1/keys", "/v1/owners", "/v1/audit", "/metrics")
ANY_KEY_PATHS = frozenset({"/v1/me"})
"""A key may always ask what it is."""

log = structlog.get_logger(__name__)


def required_scope(method: str, path: str) -> KeyScope | None:
    """Return the scope that a request needs; None: any key will do."""
    if path in ANY_KEY_PATHS:
        return None
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in ADMIN_PATHS):
        return "admin"
    return "read" if method in ("GET", "HEAD", "OPTIONS") else "write"


class GuardMiddleware:
    """Lets requests in whose caller is known and may do what they ask."""

    def __init__(
        self, app: ASGIApp, *, authenticator: Authenticator, limiter: RequestLimiter, recorder: Recorder
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._limiter = limiter
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            caller = await self._admit(scope, answer)
        except PareError as error:
            if CALLER in scope:
                answer.recorder = partial(self._recorder.record, scope[CALLER], scope)
            await answer_error(error, unread_body=_has_body(scope))(scope, receive, answer.send)
            return
        answer.recorder = partial(self._recorder.record, caller, scope)
        if caller.key_id is None:
            await self._app(scope, receive, answer.send)
        else:
            await self._watch(caller, answer, scope, receive)

    async def _admit(self, scope: Scope, answer: "_Answer") -> Caller:
        address = scope["client"][0] if scope.get("client") else ""
        caller = await self._authenticator.admit(Headers(scope=scope).get("authorization"), address)
        scope[CALLER] = caller
        structlog.contextvars.bind_contextvars(owner=caller.owner, key_id=caller.key_id)
        answer.headers, refusal = await self._limiter.take(caller.owner)
        if refusal is not None:
            raise refusal
        needed = required_scope(scope["method"], scope["path"])
        if needed is not None and needed not in caller.scopes:
            raise Forbidden(needed)
        return caller

    async def _watch(self, caller: Caller, answer: "_Answer", scope: Scope, receive: Receive) -> None:
        """Answer, and stop when the key ends before the answer does."""
        work = asyncio.ensure_future(self._app(scope, receive, answer.send))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=RECHECK_SECONDS)
                if not work.done() and not await self._authenticator.still_admits(caller):
                    break
        finally:
            # Also when we are told to stop ourselves; the end of what it does is awaited, so that nothing is half done.
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        if not work.cancelled():
            work.result()  # raises what it raised
            return
        log.info("a request ends with its key")
        ended = NotAuthenticated(f"key {caller.key_id} ended while the request went on")
        if not answer.started:
            await answer_error(ended, unread_body=_has_body(scope))(scope, receive, answer.send)
        elif answer.length_is_known:
            raise ended  # the server cuts the connection, so that nobody takes a part for the whole
        else:
            await answer.send({"type": "http.response.body", "body": b"", "more_body": False})


class _Answer:
    """What was sent of an answer so far; before it begins it gets some headers, and is written down."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.length_is_known = False
        self.headers: dict[str, str] = {}
        self.recorder: Callable[[int, Headers], Awaitable[None]] | None = None

    async def send(self, message: Message) -> None:
        """Send the next part."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers.update(self.headers)
            if self.recorder is not None:
                await self.recorder(message["status"], headers)
            self.length_is_known = "content-length" in headers
        await self._send(message)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
