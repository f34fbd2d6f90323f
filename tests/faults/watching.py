"""How much memory a process takes at its worst."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.upload_memory import read_memory


def watch_peak(pid: int) -> Callable[[], float]:
    """Return what tells how many MiB more than now a process has had at most since."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the peak so far
    before = read_memory(pid, "VmHWM")
    return lambda: read_memory(pid, "VmHWM") - before
