"""Around every request: pace of its body, HEAD for every GET, headers of every answer, the log line, the last error."""

import asyncio
import re
import threading
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.measures import Measures
from app.api.problems import TUS_VERSION, answer_unexpected, make_problem
from app.errors import TooLarge, UnsupportedFormat

CLOSE = {"Connection": "close"}
"""The rest of the body is not worth reading."""
HEAD_ONLY = "pare.head_only"
"""In the scope: the answer's body will not be sent, so do not make it."""
MAX_HEAD_BYTES = 32 * 1024
"""Of a request's headers together."""
IDLE_SECONDS = 30.0
"""A body that pauses for longer is given up."""
SLOWEST_BYTES_PER_SECOND = 256
"""A body that comes slower than this on average, after the first pause allowed, is given up."""
STOP_SECONDS = 4.0
"""A body that still comes this long after the process was told to stop is given up, while there is time to say so."""

ANSWER_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer that does not set them itself."""

RESUMABLE_PATH = "/v1/uploads"

log = structlog.get_logger(__name__)
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


class FrameMiddleware:
    """What the framework does not do for a request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        upload_paths: re.Pattern[str],
        measures: Measures,
        stopping: threading.Event,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._upload_paths = upload_paths
        self._measures = measures
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        structlog.contextvars.clear_contextvars()
        started = time.perf_counter()
        head_only = scope["method"] == "HEAD"
        inner_scope = {**scope, "method": "GET", HEAD_ONLY: True} if head_only else scope
        status, location = 0, ""

        async def answer(message: Message) -> None:
            nonlocal status, location
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                location = headers.get("location", "")
                for name, value in ANSWER_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith(RESUMABLE_PATH):
                    headers["Tus-Resumable"] = TUS_VERSION  # on errors as well
            elif head_only:
                message = {**message, "body": b""}
            await send(message)

        max_bytes = None if self._upload_paths.fullmatch(scope["path"]) else self._max_body_bytes
        pace = _Pace(receive, max_bytes, self._stopping)
        try:
            refusal = _refuse_head(scope) or _refuse(Headers(scope=scope), max_bytes)
            await (refusal or self._app)(inner_scope, pace.receive, answer)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            if status:
                log.exception("the answer broke off", error=type(error).__name__)
                raise  # the server cuts the connection, so that nobody takes half an answer for a whole one
            await answer_unexpected(error)(inner_scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            self._measures.note_request(_name_route(inner_scope), scope["method"], status, seconds)
            log.info(
                "request",
                method=scope["method"],
                path=_UNPRINTABLE.sub("?", scope["path"])[:200],
                status=status,
                milliseconds=round(seconds * 1000, 1),
                body_bytes=pace.num_bytes,
                **_name_job(inner_scope, location),
            )


def _name_route(scope: Scope) -> str | None:
    """Return the template of the path, which the router has left in the scope."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path


def _name_job(scope: Scope, location: str) -> dict[str, str]:
    """Return the job that the path names, or that the request has submitted."""
    job_id = scope.get("path_params", {}).get("job_id") or location.rpartition("/")[2]
    return {"job_id": job_id} if re.fullmatch(r"job_[a-z0-9]{26}", job_id) else {}


def _refuse_head(scope: Scope) -> Response | None:
    """Return the answer to a head that the server has let through."""
    headers = scope["headers"]
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes > MAX_HEAD_BYTES:  # which the server finds out only where it comes in several pieces
        detail = f"the head has {num_bytes} bytes; the limit is {MAX_HEAD_BYTES}"
        return make_problem(400, "bad_request", detail, "Send fewer or shorter headers.", headers=CLOSE)
    if {b"transfer-encoding", b"content-length"} <= {name for name, _ in headers}:
        # A proxy may have gone by the other one: what follows could be another client's (RFC 9112, section 6.1).
        detail = "Content-Length and Transfer-Encoding both say where the body ends"
        return make_problem(400, "bad_request", detail, "Send one of them.", headers=CLOSE)
    return None


def _refuse(headers: Headers, max_bytes: int | None) -> Response | None:
    """Return the answer to a request whose headers already tell that its body will not be taken."""
    encoding = headers.get("content-encoding", "").lower()
    if encoding not in ("", "identity"):
        detail = f"the body is compressed ({_UNPRINTABLE.sub('?', encoding)[:40]})"
        return make_problem(415, UnsupportedFormat.code, detail, "Send the bytes as they are.", headers=CLOSE)
    declared = headers.get("content-length", "")
    if max_bytes is not None and declared.isdecimal() and int(declared) > max_bytes:
        detail = f"the body has {int(declared)} bytes; the limit is {max_bytes}"
        return make_problem(413, TooLarge.code, detail, TooLarge.fix, headers=CLOSE)
    return None


class _Pace:
    """The body of one request, given up where it is too long, comes too slowly, or keeps a process from stopping."""

    def __init__(self, receive: Receive, max_bytes: int | None, stopping: threading.Event) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._stopping = stopping
        self._started = time.monotonic()
        self._stops_at: float | None = None
        self._complete = False
        self.num_bytes = 0

    async def receive(self) -> Message:
        """Return the next part."""
        if self._complete:
            return await self._receive()  # waits for the client to go away, for as long as the answer takes
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body paused for {IDLE_SECONDS:g} s") from None
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._max_bytes is not None and self.num_bytes > self._max_bytes:
                raise HTTPException(413, f"the body has more than {self._max_bytes} bytes")
            if not self._complete and self._stopping.is_set():
                self._stops_at = self._stops_at or time.monotonic() + STOP_SECONDS
                if time.monotonic() >= self._stops_at:
                    raise HTTPException(503, "the service stops")
            seconds = time.monotonic() - self._started
            if not self._complete and self.num_bytes < (seconds - IDLE_SECONDS) * SLOWEST_BYTES_PER_SECOND:
                raise HTTPException(408, f"{self.num_bytes} bytes in {seconds:.0f} s are too slow")
        return message
