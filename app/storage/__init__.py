"""Storage: blobs under their SHA-256. `open_storage` finds the implementation by the URL's scheme."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.errors import ConfigurationError
from app.storage.base import Blob, BlobWriter, Section, Storage, StoredBlob
from app.storage.local import LocalStorage
from app.storage.sections import checkpoint_storage, owner_storage, upload_storage

__all__ = [
    "Blob",
    "BlobWriter",
    "Section",
    "Storage",
    "StoredBlob",
    "checkpoint_storage",
    "open_storage",
    "owner_storage",
    "upload_storage",
]


def open_storage(url: str, reserve_bytes: int = 0) -> Storage:
    """Open the store at a URL, for example file:///var/lib/pare/store or s3://bucket/prefix?endpoint=https://host.

    Nothing is written to a disk of which less than `reserve_bytes` would stay free.
    """
    scheme = urlsplit(url).scheme
    if scheme not in OPENERS:
        raise ConfigurationError(
            f"storage_url {url.split('@')[-1]!r} has the scheme {scheme!r}; known: {', '.join(sorted(OPENERS))}"
        )
    return OPENERS[scheme](url, reserve_bytes)


def _open_local(url: str, reserve_bytes: int) -> Storage:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigurationError(f"storage_url {url!r} must name an absolute path: file:///path")
    return LocalStorage(Path(unquote(parts.path)), reserve_bytes)


def _open_objects(url: str, reserve_bytes: int) -> Storage:
    try:
        from app.storage.objects import open_objects
    except ImportError:
        raise ConfigurationError(
            "storage_url is on S3, and the package for that is not installed", fix="pip install 'pare[s3]'"
        ) from None
    return open_objects(url, reserve_bytes)


OPENERS: dict[str, Callable[[str, int], Storage]] = {"file": _open_local, "s3": _open_objects}
"""One opener per scheme."""
