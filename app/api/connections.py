"""Connections on which no request comes: the server closes them, so that silent strangers cannot use them all up."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

LOOK_SECONDS = 15.0
"""A connection is closed when it waited for a whole request head from one look to the next."""


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
