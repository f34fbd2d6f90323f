"""A network of its own for one process and its way to the broker; what is cut there is cut nowhere else."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

PROGRAMS = ("unshare", "nsenter", "ip", "ss", "nft")
"""What it is made of: util-linux, iproute2, nftables."""


class Network:
    """A network namespace with a door to a unix socket outside. Needs root."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Self:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own = Path("/proc/self/ns/net").readlink()
        end = time.monotonic() + 20
        while Path(f"/proc/{self._holder.pid}/ns/net").readlink() == own:
            assert time.monotonic() < end, "no network namespace could be made"
            time.sleep(0.01)
        self.prefix = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]
        self._run("ip", "link", "set", "lo", "up")
        door = [*self.prefix, sys.executable, "-m", "tests.faults.proxy", str(self._target)]
        self._door = subprocess.Popen(door, stdout=subprocess.PIPE, text=True)
        assert self._door.stdout is not None
        self._port = int(self._door.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._door, self._holder):
            process.kill()
            process.communicate()

    @property
    def url(self) -> str:
        """The broker's, inside."""
        return f"redis://127.0.0.1:{self._port}/0"

    def lose_what_open_connections_send(self) -> None:
        """From now on nothing that is sent on the connections that there are arrives at the broker; new ones work."""
        listed = self._run("ss", "-Htn", "state", "established", f"( dport = :{self._port} )")
        ports = set(re.findall(r"127\.0\.0\.1:(\d+) +127\.0\.0\.1:", listed))
        assert ports, listed
        self._run("nft", "add table inet door; add chain inet door in { type filter hook input priority 0; }")
        self._run("nft", f"add rule inet door in tcp dport {self._port} tcp sport {{ {', '.join(ports)} }} drop")

    def _run(self, *command: str) -> str:
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout
