"""Connections on which no request comes: silent ones are closed, and what is no HTTP gets a problem document."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from app.api.problems import make_problem

LOOK_SECONDS = 15.0
"""A connection is closed when it waited for a whole request head from one look to the next."""
FIX = "Send HTTP/1.1, with a head of at most 32 KiB and a body of the length or the chunks that the head announces."


class PatientProtocol(H11Protocol):
    """uvicorn's, which by itself waits for ever for the first request, and for the rest of one that has begun."""

    _look: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look."""
        super().connection_made(transport)
        self._look_later(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words for it are in its log
        """Answer what cannot be read, unless an answer has begun: then the connection is just closed."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = make_problem(400, "bad_request", "this is no HTTP request that can be read", FIX)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look_later(self, waited_after: RequestResponseCycle | bool | None) -> None:
        self._look = self.loop.call_later(LOOK_SECONDS, self._close_or_look, waited_after)

    def _close_or_look(self, waited_after: RequestResponseCycle | bool | None) -> None:
        """`waited_after` is the request after which the connection was waiting at the last look; False: it was not."""
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)
        waits = cycle is None or cycle.response_complete
        if waits and cycle is waited_after:
            self.transport.close()
        else:
            self._look_later(cycle if waits else False)
