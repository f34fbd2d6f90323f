"""`pare serve`'s own code in a process of its own, as users start it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.worker.conftest import find_descendants, wait_until

START = "import sys; from pathlib import Path; from worker.serve import serve; serve('127.0.0.1', 0, Path(sys.argv[1]))"


@dataclass(frozen=True)
class Serving:
    """A service that answers, and the process that holds its parts."""

    url: str
    pid: int

    def find_api(self) -> int:
        """Return the process of its API."""
        (found,) = find_descendants(self.pid, "-m\0app\0")
        return found


def clean_environment(**settings: str) -> dict[str, str]:
    """Return this process's environment, with these settings alone."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("PARE_")}, **settings}


def start_serve(data_dir: Path, environment: Mapping[str, str], errors: IO[str] | int) -> "subprocess.Popen[str]":
    """Start it on a data directory; `errors` is where its standard error goes."""
    command = [sys.executable, "-c", START, str(data_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def read_url(process: "subprocess.Popen[str]") -> str:
    """Wait until it answers; return where."""
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"ready at (http://\S+) \(isolation: ", line)
    assert match is not None, line + str(process.communicate()[1] if process.poll() is not None else "")
    return match[1]


@contextmanager
def serve(environment: Mapping[str, str], folder: Path) -> Iterator[Serving]:
    """Within it the service runs, on `folder`/data; it ends in order, and leaves no process."""
    with (folder / "serve.log").open("w") as log:
        process = start_serve(folder / "data", environment, log)
    try:
        yield Serving(read_url(process), process.pid)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: not find_service(folder), 60, "the end of every process")


def find_service(folder: Path) -> list[str]:
    """Return the command lines of processes that belong to `folder`/data: by environment, argument or open file."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                if str(folder / "data").encode() in told:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found
