"""The log of one attempt: everything engines wrote, but never more than a limit; the middle is what is left out."""

import threading
from collections import deque
from pathlib import Path

# Only newline and tab survive of the control characters: a log is read in terminals.
_PRINTABLE = bytes(code if (code >= 32 and code != 127) or code in b"\n\t" else ord("?") for code in range(256))


class CappedLog:
    """A file that keeps the first and the last half of its limit. Safe to use from several threads."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._lock = threading.Lock()
        self._head_left = max_bytes // 2
        self._tail_limit = max_bytes - max_bytes // 2
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._dropped = 0

    def write(self, data: bytes) -> None:
        """Append, dropping from the middle where the limit is reached."""
        data = data.translate(_PRINTABLE)
        with self._lock:
            if self._file.closed:
                return
            head, rest = data[: self._head_left], data[self._head_left :]
            if head and not self._append(head):
                rest, self._head_left = data, 0  # the engine must not wait for space on the disk: go on in memory
            elif head:
                self._head_left -= len(head)
            if rest:
                self._keep_tail(rest)

    def _append(self, data: bytes) -> bool:
        try:
            return self._file.write(data) == len(data)
        except OSError:
            return False

    def _keep_tail(self, data: bytes) -> None:
        self._tail.append(data)
        self._tail_bytes += len(data)
        while self._tail_bytes > self._tail_limit:
            excess = self._tail_bytes - self._tail_limit
            first = self._tail.popleft()
            if len(first) > excess:
                self._tail.appendleft(first[excess:])
            cut = min(len(first), excess)
            self._tail_bytes -= cut
            self._dropped += cut

    def last_bytes(self, limit: int = 4000) -> bytes:
        """Return the end of what was written so far."""
        with self._lock:
            tail = b"".join(self._tail)[-limit:]
            if len(tail) < limit:
                size = self.path.stat().st_size
                with self.path.open("rb") as file:
                    file.seek(max(0, size - (limit - len(tail))))
                    tail = file.read() + tail
            return tail

    def close(self) -> Path:
        """Write the last part and return the file."""
        with self._lock:
            if not self._file.closed:
                if self._dropped:
                    self._append(f"\n[... {self._dropped} bytes left out ...]\n".encode())
                for part in self._tail:
                    self._append(part)
                self._file.close()
        return self.path
