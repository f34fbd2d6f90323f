"""Addresses that send bad keys: after some of them they hear "later" instead of "no". Counted in each API process."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_BAD_KEYS = 20
"""In one period."""
PERIOD_SECONDS = 60.0
MAX_ADDRESSES = 10_000
"""The one that was silent longest is forgotten first."""


class BadKeyThrottle:
    """Counts bad keys for each address; those of one IPv6 network (/64, one subscriber) count together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """Address -> when its period began, bad keys since then."""

    def note(self, address: str) -> None:
        """Count a bad key."""
        name = _name(address)
        began, number = self._seen.pop(name, (self._clock(), 0))
        if self._clock() - began >= PERIOD_SECONDS:
            began, number = self._clock(), 0
        self._seen[name] = (began, number + 1)
        if len(self._seen) > MAX_ADDRESSES:
            self._seen.popitem(last=False)

    def wait_seconds(self, address: str) -> float:
        """Return how long the address has to wait; 0: it has not sent too many bad keys."""
        began, number = self._seen.get(_name(address), (0.0, 0))
        return max(0.0, began + PERIOD_SECONDS - self._clock()) if number >= MAX_BAD_KEYS else 0.0


def _name(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
