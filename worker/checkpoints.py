"""The checkpoints of one attempt's job: taken from its engine into storage, and given to an engine that starts.

Nothing in them is believed or even read here: they come from a sandbox, and go into one of the same job alone.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from app.errors import PareError, StorageCorrupt
from app.jobs import Place, StoredCheckpoint
from app.recipes.plan import CheckpointFile
from app.storage import Section
from worker.job_files import open_plain

_CHUNK_BYTES = 1024 * 1024
_log = structlog.get_logger(__name__)


class CheckpointShelf:
    """The checkpoints that are in storage, newest first."""

    def __init__(self, section: Section, known: tuple[StoredCheckpoint, ...], max_bytes: int) -> None:
        self._section, self._max_bytes = section, max_bytes
        self._known = list(known)
        self._placed: dict[str, StoredCheckpoint] = {}

    def place(self, directory: Path) -> tuple[str, ...]:
        """Copy those whose digest is right to DIR/in; return their names, newest first."""
        self._placed = {}
        for number, checkpoint in enumerate(self._known):
            name = f"checkpoint{number}"
            path = directory / "in" / name
            try:
                self._section.download(checkpoint.blob.sha256, checkpoint.blob.size_bytes, path)
            except StorageCorrupt as error:
                _log.warning("a checkpoint is damaged and left alone", error=error.detail)
                continue
            path.chmod(0o644)
            self._placed[name] = checkpoint
        return tuple(self._placed)

    def find(self, name: str) -> Place | None:
        """Return where in the work a checkpoint that was placed under this name was taken."""
        checkpoint = self._placed.get(name)
        return checkpoint.place if checkpoint is not None else None

    def take(
        self, directory: Path, told: CheckpointFile, place: Place, check_end: Callable[[], None]
    ) -> StoredCheckpoint | None:
        """Move a file from DIR/out/checkpoints into storage; None where it is not what the engine says.

        A checkpoint that cannot be stored is a loss of time at worst: it never fails the job. `check_end` may raise.
        """
        try:
            handle = open_plain(directory / "out", "checkpoints", told.name)
        except OSError as error:
            _log.warning("a checkpoint is no plain file", name=told.name, error=error.strerror)
            return None
        try:
            with os.fdopen(handle, "rb") as file, self._section.writer() as writer:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes != told.size_bytes or size_bytes > self._max_bytes:
                    _log.warning("a checkpoint has the wrong size", name=told.name, size_bytes=size_bytes)
                    return None
                digest = hashlib.sha256()
                while chunk := file.read(_CHUNK_BYTES):
                    check_end()
                    digest.update(chunk)
                    writer.write(chunk)
                if digest.hexdigest() != told.sha256:
                    _log.warning("a checkpoint has the wrong digest", name=told.name)
                    return None
                blob = writer.commit()
        except PareError as error:
            _log.warning("a checkpoint could not be stored", name=told.name, error=error.code, detail=error.detail)
            return None
        with suppress(OSError):
            (directory / "out" / "checkpoints" / told.name).unlink()
        stored = StoredCheckpoint(place, blob)
        self._known = [stored, *self._known[:1]]
        return stored

    def delete(self, digests: list[str]) -> None:
        """Delete bytes that no row names any more."""
        for sha256 in digests:
            with suppress(PareError, OSError):  # what is left behind goes with the job
                self._section.delete(sha256)

    def clear(self) -> None:
        """Delete all: the job needs none any more."""
        self._section.clear()
