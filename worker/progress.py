"""Progress lines on their way from an engine, which is not trusted, to the database, which must not be flooded."""

import math
import threading
import time
from collections import deque
from dataclasses import dataclass

from pydantic import ValidationError

from app.recipes.plan import MAX_PROGRESS_LINE_BYTES, Progress

_MAX_WAITING = 200
_MAX_STAGES = 200
READY = "ready"
"""The stage of the line that an engine prints before it is given a job."""


@dataclass(frozen=True)
class Stage:
    """What an engine said it does, until it said that it does something else."""

    name: str
    step: int | None
    began_at_ns: int
    """When the first line about it came, in nanoseconds since 1970."""


class ProgressInbox:
    """Takes the bytes of stdout, keeps what is new for the next write. Safe to use from several threads."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.first_line_at: float | None = None
        """Monotonic time of the first line after `ready`."""
        self.last_line_at = time.monotonic()
        self.num_refused = 0
        self._lock = threading.Lock()
        self._rest = b""
        self._too_long = False
        self._waiting: deque[Progress] = deque(maxlen=_MAX_WAITING)
        self._fraction = 0.0
        self.last: Progress | None = None
        """The newest line."""
        self.stages: list[Stage] = []
        """In their order; the first ones, where an engine says endless ones."""
        self._checkpoint: Progress | None = None
        self._resumed: str | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """Take more of stdout; return the lines that are not progress, for the log."""
        refused: list[bytes] = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._too_long or len(line) > MAX_PROGRESS_LINE_BYTES or not self._take(line):
                refused.append(line[:200])
            self._too_long = False
        if len(self._rest) > MAX_PROGRESS_LINE_BYTES:
            self._rest, self._too_long = b"", True
        self.num_refused += len(refused)
        return refused

    def _take(self, line: bytes) -> bool:
        if not line.strip():
            return True
        try:
            progress = Progress.model_validate_json(line)
        except (ValidationError, RecursionError):
            return False
        if progress.stage == READY:
            self.ready.set()
            return True
        with self._lock:
            self.last_line_at = time.monotonic()
            if self.first_line_at is None:
                self.first_line_at = self.last_line_at
            self._fraction = max(self._fraction, progress.fraction)
            progress = progress.model_copy(update={"fraction": self._fraction, **_clean(progress)})
            if progress.checkpoint is not None:
                self._checkpoint = progress
            self._resumed = progress.resumed or self._resumed
            if len(self.stages) < _MAX_STAGES and (
                self.last is None or (self.last.stage, self.last.step) != (progress.stage, progress.step)
            ):
                self.stages.append(Stage(progress.stage, progress.step, time.time_ns()))
            self.last = progress
            last = self._waiting[-1] if self._waiting else None
            if last is not None and (last.stage, last.step) == (progress.stage, progress.step):
                self._waiting.pop()
            self._waiting.append(progress)
        return True

    def drain(self) -> list[Progress]:
        """Return what came since the last call; of a stage only its newest line."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        return waiting

    def take_checkpoint(self) -> Progress | None:
        """Return the newest line that tells of a checkpoint, once."""
        with self._lock:
            told, self._checkpoint = self._checkpoint, None
        return told

    def take_resumed(self) -> str | None:
        """Return the name of the checkpoint that the engine says it goes on from, once."""
        with self._lock:
            name, self._resumed = self._resumed, None
        return name


def _clean(progress: Progress) -> dict[str, object]:
    message = "".join(letter if letter.isprintable() else "?" for letter in progress.message)
    metrics = {
        name[:100]: None if isinstance(value, float) and not math.isfinite(value) else _cut(value)
        for name, value in progress.metrics.items()
    }
    return {"message": message, "metrics": metrics}


def _cut(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else "?" for letter in value[:1000])
    return value if not isinstance(value, int) or abs(value) < 2**63 else None
