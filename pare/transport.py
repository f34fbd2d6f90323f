"""HTTP with the service: one connection pool, retries where repeating is harmless, problems turned into errors."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx2
import stamina

from pare.errors import NotReachable, PareError, Refused, UsageError, refused

DEFAULT_URL = "http://127.0.0.1:8000"
# Reads wait longer than the 15 s between the service's keep-alive comments on an event stream.
TIMEOUT = httpx2.Timeout(connect=5.0, read=60.0, write=60.0, pool=5.0)
OnBytes = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
_BUSY = (429, 502, 503, 504)
_IN_USE = "idempotency_key_in_use"
"""Our own first try is still being worked on: its answer comes with the next."""
_MAX_RETRY_AFTER_SECONDS = 30.0


class _Busy(Exception):
    """The service asked to come back later."""

    def __init__(self, error: Refused, retry_after: str | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_seconds = (
            min(float(retry_after), _MAX_RETRY_AFTER_SECONDS) if retry_after and retry_after.isdigit() else None
        )


class Transport:
    """Requests to one service."""

    def __init__(self, url: str | None = None, *, api_key: str | None = None, attempts: int = 5) -> None:
        self.url = (url or os.environ.get("PARE_URL") or DEFAULT_URL).rstrip("/")
        self.attempts = attempts
        try:
            self._http = httpx2.Client(base_url=self.url, timeout=TIMEOUT, headers=_headers(api_key))
            address = self._http.base_url
        except httpx2.InvalidURL as error:
            raise _not_an_address(self.url) from error
        if address.scheme not in ("http", "https") or not address.host:
            raise _not_an_address(self.url)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        json: Any = None,
        headers: dict[str, str] | None = None,
        repeatable: bool | None = None,
        accept_statuses: tuple[int, ...] = (),
        timeout: httpx2.Timeout = TIMEOUT,
    ) -> httpx2.Response:
        """Send one request and return its successful answer.

        Repeatable requests (by default all but POST and PATCH) are sent again when the connection breaks; others only
        when they certainly never arrived or the service said that it did nothing.
        """
        safe = method in ("GET", "HEAD", "DELETE") if repeatable is None else repeatable
        tries = 0

        def send() -> httpx2.Response:
            nonlocal tries
            tries += 1
            response = self._http.request(
                method, path, params=_present(params), json=json, headers=headers, timeout=timeout
            )
            if response.is_success or response.status_code in accept_statuses:
                return response
            # The first DELETE may have done it before its answer was lost.
            if method == "DELETE" and response.status_code == 404 and tries > 1:
                return response
            error = problem_of(response)
            full = error.code == "quota_exceeded" and not error.retryable
            busy = response.status_code in _BUSY and (safe or response.status_code in (429, 503)) and not full
            if busy or error.code == _IN_USE:
                raise _Busy(error, response.headers.get("retry-after"))
            raise error

        return self.retry(send, safe=safe)

    def get(self, path: str, **params: Any) -> Any:
        """GET a JSON document."""
        return self.request("GET", path, params=params).json()

    def retry(self, call: Callable[[], httpx2.Response], *, safe: bool) -> httpx2.Response:
        """Call until it answers, the attempts are used up, or repeating could do something twice."""

        def worth_repeating(error: Exception) -> bool | float:
            if isinstance(error, _Busy):
                return error.wait_seconds if error.wait_seconds is not None else True
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout):
                return True
            return safe and isinstance(error, httpx2.TransportError)

        try:
            for attempt in stamina.retry_context(
                worth_repeating, attempts=self.attempts, timeout=90.0, wait_initial=0.1, wait_max=5.0, wait_jitter=0.2
            ):
                with attempt:
                    return call()
        except _Busy as busy:
            raise busy.error from None
        except httpx2.RequestError as error:
            raise self.unreachable(error) from error
        raise AssertionError("retry_context ends by returning or raising")

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        content: Iterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout = TIMEOUT,
    ) -> Iterator[httpx2.Response]:
        """Open one request whose answer is read piece by piece; no retries, the caller knows where to go on."""
        with self._http.stream(
            method, path, params=_present(params), content=content, headers=headers, timeout=timeout
        ) as response:
            yield response

    def unreachable(self, error: Exception) -> PareError:
        """Return the error for a connection that could not be made or broke."""
        return NotReachable(self.url, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def problem_of(response: httpx2.Response) -> Refused:
    """Return the error for an answer that is not a success; reads the body of a streamed one."""
    response.read()
    try:
        body = response.json()
    except ValueError:
        body = None
    problem = cast("dict[str, Any]", body) if isinstance(body, dict) else {"detail": response.text[:500]}
    return refused(response.status_code, problem)


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {"User-Agent": "pare"}
    key = (api_key or os.environ.get("PARE_API_KEY") or "").strip()
    if key:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UsageError("the API key has characters that no key has", fix="Give it as it was shown: pare_...")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _not_an_address(url: str) -> UsageError:
    return UsageError(f"{url!r} is not the address of a service", fix=f"Give one like {DEFAULT_URL} (--url, PARE_URL).")


def _present(params: dict[str, Any] | None) -> dict[str, Any] | None:
    return {name: value for name, value in params.items() if value is not None} if params else None
