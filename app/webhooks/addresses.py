"""Where webhooks may go: to public addresses, and to networks that the operator allows.

A URL comes from a user and the request is made from inside the operator's network, so it must not reach what is there
(server-side request forgery). A name can resolve to anything, and to something else a moment later: it is resolved
once for each connection, every address is checked, and the connection is made to a checked address.
"""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from app.settings import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) -> its addresses; raises OSError where there are none."""

MAX_URL_CHARACTERS = 2048

# Address.is_global alone is not enough: it takes multicast, 192.0.0.8, NAT64 and 6to4 forms of private addresses for
# public. Sources: the IANA special-purpose address registries (RFC 6890) and the multicast and reserved blocks.
_DENIED_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
            "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        ),
    )
)  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All global unicast; what lies outside (loopback, mapped, NAT64, local, multicast, ...) is never public."""
_DENIED_V6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"))
)


class DestinationRefused(Exception):
    """Webhooks do not go there."""


def is_public(address: Address) -> bool:
    """Return whether an address belongs to a host on the public internet."""
    if isinstance(address, ipaddress.IPv4Address):
        denied: tuple[Network, ...] = _DENIED_V4
    elif address in _GLOBAL_V6:
        denied = _DENIED_V6
    else:
        return False
    return address.is_global and not any(address in network for network in denied)


def resolve_name(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Destinations:
    """What the settings allow."""

    def __init__(self, settings: Settings, resolve: Resolve = resolve_name) -> None:
        self._settings = settings
        self._resolve = resolve

    def check_url(self, url: str) -> tuple[str, int]:
        """Return host and port of a URL; raises DestinationRefused for one that is not allowed."""
        if len(url) > MAX_URL_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise DestinationRefused(
                f"a URL has at most {MAX_URL_CHARACTERS} printable ASCII characters (xn--... for other names)"
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise DestinationRefused(f"this is not a URL: {error}") from None
        if parts.scheme not in self._settings.webhook_schemes:
            raise DestinationRefused(
                f"the scheme is {parts.scheme!r}; allowed: {self._name(self._settings.webhook_schemes)}"
            )
        if not parts.hostname:
            raise DestinationRefused("the URL names no host")
        if "@" in parts.netloc:
            raise DestinationRefused("the URL holds a user name or password; messages are signed instead")
        if parts.fragment:
            raise DestinationRefused("the URL has a fragment, which is never sent")
        port = port if port is not None else {"https": 443, "http": 80}[parts.scheme]
        if port not in self._settings.webhook_ports:
            raise DestinationRefused(f"the port is {port}; allowed: {self._name(self._settings.webhook_ports)}")
        return parts.hostname, port

    def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses to connect to; raises DestinationRefused where one of them is not allowed."""
        try:
            addresses = list(self._resolve(host, port))
        except (OSError, UnicodeError):  # the second for names that cannot be written in DNS
            addresses = []
        # One answer for both: what exists inside the operator's network is nobody's business.
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise DestinationRefused(f"{host} does not resolve to public addresses alone")
        return addresses

    def _is_allowed(self, text: str) -> bool:
        address = ipaddress.ip_address(text)
        return is_public(address) or any(address in network for network in self._settings.webhook_networks)

    @staticmethod
    def _name(allowed: Sequence[object]) -> str:
        return ", ".join(map(str, allowed)) or "none"
