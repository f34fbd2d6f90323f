"""The worker's wish that the engine writes a checkpoint and ends: the line "stop" on stdin."""

import os
import threading

STOPPED = 75
"""Exit status of an engine that was asked to stop (EX_TEMPFAIL)."""


class StopRequest:
    """Set by a thread that reads stdin, looked at between two steps of training."""

    def __init__(self) -> None:
        self.is_awaited = False
        """Whether someone looks soon; else there is nothing to write, and the engine ends at once."""
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether the worker wants the engine to stop."""
        return self._requested.is_set()

    def listen(self) -> None:
        """Wait for the line in the background; its pipe may close without it."""
        threading.Thread(target=self._wait, name="stop", daemon=True).start()

    def request(self) -> None:
        """Ask to stop."""
        self._requested.set()
        if not self.is_awaited:
            self.end()

    def end(self) -> None:
        """End the process, whatever its threads are doing."""
        os._exit(STOPPED)

    def _wait(self) -> None:
        # Not sys.stdin: a thread that holds its lock when the interpreter ends would be an error.
        line = b""
        while data := os.read(0, 64):
            line += data
            if line.endswith(b"stop\n"):
                self.request()
                return
