"""Isolation with util-linux `unshare` and our own launcher, for machines without bubblewrap."""

import shutil

from worker.sandbox.isolation import Isolation


def is_installed() -> bool:
    """Whether there is an `unshare` to try."""
    return shutil.which("unshare") is not None


def wrap(isolation: Isolation) -> list[str]:
    """Return the command line in front of the launcher's, which then makes the file view and drops every right."""
    program = shutil.which("unshare")
    assert program is not None
    user = ["--user", "--map-root-user"] if isolation.user_namespace else []
    namespaces = ["--pid", "--net", "--mount", "--ipc", "--uts", "--cgroup"]
    return [program, *user, *namespaces, "--fork", "--kill-child=SIGKILL", "--"]
