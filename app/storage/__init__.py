"""Storage: blobs under their SHA-256. `open_storage` finds the implementation by the URL's scheme."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.errors import ConfigurationError
from app.storage.base import Blob, BlobWriter, Storage
from app.storage.local import LocalStorage

__all__ = ["Blob", "BlobWriter", "Storage", "open_storage"]


def open_storage(url: str) -> Storage:
    """Open the store at a URL, for example file:///var/lib/pare/store."""
    scheme = urlsplit(url).scheme
    if scheme not in OPENERS:
        raise ConfigurationError(
            f"storage_url {url.split('@')[-1]!r} has the scheme {scheme!r}; known: {', '.join(sorted(OPENERS))}"
        )
    return OPENERS[scheme](url)


def _open_local(url: str) -> Storage:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigurationError(f"storage_url {url!r} must name an absolute path: file:///path")
    return LocalStorage(Path(unquote(parts.path)))


OPENERS: dict[str, Callable[[str], Storage]] = {"file": _open_local}
"""One opener per scheme."""
