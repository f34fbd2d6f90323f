"""One attempt to deliver a message: a signed POST over a connection to a checked address, with all its limits."""

import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore2
from standardwebhooks.webhooks import Webhook

from app.webhooks.addresses import DestinationRefused, Destinations

TIMEOUT_SECONDS = 15.0
"""For everything together, from the first packet to the answer's last header."""
MAX_ANSWER_BYTES = 64 * 1024
"""Of the answer, headers included. Its body means nothing to us and is kept nowhere."""
USER_AGENT = "Pare-Webhooks/1"


@dataclass(frozen=True)
class Parcel:
    """What one attempt needs to know."""

    delivery_id: str
    webhook_id: str
    num_attempts: int
    """This attempt included; it also tells this attempt from later ones."""
    url: str
    body: str
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt."""

    status: int | None
    """The HTTP status, where there was one."""
    error: str | None
    """destination_refused, timeout, tls_failed, connection_failed or bad_answer; null where a status came."""
    milliseconds: int
    retry_after_seconds: float | None = None

    @property
    def is_delivered(self) -> bool:
        """Whether the receiver has taken the message. A redirect has not."""
        return self.status is not None and 200 <= self.status < 300


def sign(parcel: Parcel, now: datetime) -> dict[str, str]:
    """Return the headers that prove who sent a message and when: one signature for each valid secret."""
    signatures = [Webhook(secret).sign(parcel.delivery_id, now, parcel.body) for secret in parcel.secrets]
    return {
        "webhook-id": parcel.delivery_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


class Sender:
    """Sends messages; no redirects, no proxies, no cookies, a new connection for each."""

    def __init__(
        self,
        destinations: Destinations,
        *,
        tls: ssl.SSLContext | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._destinations = destinations
        self._tls = tls or httpcore2.default_ssl_context()
        self._timeout_seconds = timeout_seconds

    def send(self, parcel: Parcel) -> Outcome:
        """Make one attempt."""
        started_at = time.monotonic()
        status = error = retry_after = None
        try:
            self._destinations.check_url(parcel.url)
            status, retry_after = self._post(parcel, started_at + self._timeout_seconds)
        except DestinationRefused:
            error = "destination_refused"
        except httpcore2.TimeoutException:
            error = "timeout"
        except _TlsFailed:
            error = "tls_failed"
        except httpcore2.NetworkError:
            error = "connection_failed"
        except (httpcore2.ProtocolError, UnicodeError):
            error = "bad_answer"
        milliseconds = round((time.monotonic() - started_at) * 1000)
        return Outcome(status, error, milliseconds, retry_after)

    def _post(self, parcel: Parcel, deadline: float) -> tuple[int, float | None]:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(parcel.body.encode())),
            "user-agent": USER_AGENT,
            "accept": "*/*",
            "connection": "close",
            **sign(parcel, datetime.now(UTC)),
        }
        backend = _CheckedBackend(self._destinations, deadline)
        with (
            httpcore2.ConnectionPool(ssl_context=self._tls, network_backend=backend) as pool,
            pool.stream("POST", parcel.url, headers=list(headers.items()), content=parcel.body.encode()) as answer,
        ):
            found = dict(answer.headers)
            return answer.status, parse_retry_after(found.get(b"retry-after", b"").decode("latin-1"))


def parse_retry_after(text: str) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number of them, or a date (RFC 9110, 10.2.3)."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return max(0.0, seconds)


class _TlsFailed(httpcore2.NetworkError):
    """The receiver does not prove who it is, or does not speak TLS."""


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects to addresses that were checked. The name stays in the Host header and in TLS."""

    def __init__(self, destinations: Destinations, deadline: float) -> None:
        self._destinations = destinations
        self._deadline = deadline
        self._plain = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - one deadline holds for everything
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address that answers."""
        addresses: Sequence[str] = self._destinations.resolve(host, port)
        failure: Exception | None = None
        for address in addresses:
            try:
                stream = self._plain.connect_tcp(address, port, _left(self._deadline), local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _LimitedStream(stream, self._deadline)
        assert failure is not None, "a name without addresses is refused"
        raise failure


class _LimitedStream(httpcore2.NetworkStream):
    """A connection on which nothing takes longer than the deadline and no more than the limit is read."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline
        self._num_bytes_left = MAX_ANSWER_BYTES

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """Return the next bytes."""
        if self._num_bytes_left <= 0:
            raise httpcore2.RemoteProtocolError("the answer is too long")
        data = self._stream.read(min(max_bytes, self._num_bytes_left), _left(self._deadline))
        self._num_bytes_left -= len(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """Send bytes."""
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore2.NetworkStream:
        """Go on encrypted."""
        try:
            encrypted = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        except httpcore2.ConnectError as error:
            raise _TlsFailed(str(error)) from error
        return _LimitedStream(encrypted, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore2.ReadTimeout("the deadline has passed")
    return seconds
