"""The processes that came of this one, from /proc. Elsewhere than on Linux none are known."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process of this machine."""

    id: int
    parent_id: int
    started: int
    """Clock ticks since boot: with the id, this names a process for good."""
    command: str

    def kill(self) -> None:
        """End it at once, if it is still the same process."""
        current = _read(self.id)
        if current is not None and current.started == self.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.id, signal.SIGKILL)

    def peak_memory_bytes(self) -> int:
        """Return the largest resident size it ever had; 0 when it is gone."""
        try:
            status = Path(f"/proc/{self.id}/status").read_text()
        except OSError:
            return 0
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


def descendants(of: int | None = None) -> list[Process]:
    """Return every process below this one (or `of`), children before grandchildren; zombies included."""
    root = os.getpid() if of is None else of
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        process = _read(int(entry.name))
        if process is not None:
            children.setdefault(process.parent_id, []).append(process)
    found: list[Process] = []
    generation = children.get(root, [])
    while generation:
        found += generation
        generation = [child for parent in generation for child in children.get(parent.id, [])]
    return found


def _read(id: int) -> Process | None:
    try:
        stat = Path(f"/proc/{id}/stat").read_text()
        command = Path(f"/proc/{id}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    # The name in brackets may hold spaces and brackets; what follows its last bracket does not.
    fields = stat.rpartition(")")[2].split()
    return Process(id, int(fields[1]), int(fields[19]), command)
