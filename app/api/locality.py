"""A service for one machine asks nobody who they are, so web pages that its user looks at must not get to it.

A page can send requests to any address (they carry an Origin), and can have its own name resolve to 127.0.0.1, which
makes our answers its own (then the Host is that name).
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.problems import make_problem

_FIX = "Use a client that is no web page, at the address that `pare serve` shows."


class LocalityMiddleware:
    """Refuses requests that a web page has caused."""

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._app = app
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            named, origin = headers.get("host", ""), headers.get("origin")
            detail = None
            if not self._is_ours(named):
                detail = "the Host header names another machine; this service is for the machine it runs on"
            elif origin is not None and urlsplit(origin).netloc != named:
                detail = "the request comes from a web page of another origin"
            if detail is not None:
                refusal = make_problem(403, "not_local", detail, _FIX, headers={"Connection": "close"})
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, named: str) -> bool:
        """Whether a Host is an address, or a name that no stranger can have: rebinding needs a name of its own."""
        try:
            host = urlsplit(f"//{named}").hostname or ""
            if host in ("", "localhost", self._host):
                return True
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True
