"""Large files that the nginx in front sends: the API says who gets what, and names the file by X-Accel-Redirect.

Only where nginx answers the very request as the API would; every other one the API answers itself.
"""

from fastapi import Request

from app.storage import Section

PROXY_HEADER = "x-sendfile-type"
"""In a request: what the proxy that it came through acts on. nginx sets it; who speaks to the API directly has none."""
MECHANISM = "X-Accel-Redirect"
UNLIKE = ("if-match", "if-modified-since", "if-unmodified-since")
"""Conditions that nginx would look at again, with a validator that it makes of the file's time."""


def find_internal_uri(
    request: Request, section: Section, sha256: str, size_bytes: int, prefix: str, *, whole: bool
) -> str | None:
    """Return where the proxy has the bytes, below its internal location `prefix`; None: it is not to send them.

    A whole file only if it was verified lately. A range is not verified whoever sends it.
    """
    if not prefix or request.headers.get(PROXY_HEADER) != MECHANISM:
        return None
    if any(name in request.headers for name in UNLIKE) or (whole and "range" in request.headers):
        return None
    path = section.locate(sha256, size_bytes, verified=whole)
    return None if path is None else prefix + path
