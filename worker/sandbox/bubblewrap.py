"""Isolation with bubblewrap: the strongest layer, where the program is installed and user namespaces are allowed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from worker.sandbox.isolation import Isolation
from worker.sandbox.layout import readable_paths, system_links


def is_installed() -> bool:
    """Whether there is a bubblewrap to try."""
    return shutil.which("bwrap") is not None


def wrap(
    isolation: Isolation, job: str, extra: tuple[str, ...], device_nodes: Sequence[str], *, shm_in_memory: bool
) -> list[str]:
    """Return the command line in front of the launcher's; the job's directory appears as /job."""
    program = shutil.which("bwrap")
    assert program is not None
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    rights = ["--cap-drop", "ALL"]
    if isolation.user_namespace:
        namespaces += ["--unshare-user"]
    else:
        # Root: the launcher itself changes to the engine's user, then these two are gone as well.
        rights += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    view = ["--ro-bind", "/proc", "/proc"] if isolation.shared_proc else ["--proc", "/proc"]
    view += ["--dev", "/dev"]
    for node in device_nodes:
        view += ["--dev-bind", node, node]
    view += ["--perms", "0755", "--dir", "/job"]
    view += ["--ro-bind", f"{job}/in", "/job/in", "--bind", f"{job}/out", "/job/out"]
    # Before what is shown read-only: Python or the project may itself lie below /tmp.
    for place in ("/job/tmp", "/tmp", *(() if shm_in_memory else ("/dev/shm",))):
        view += ["--bind", f"{job}/tmp", place]
    if shm_in_memory:
        view += ["--perms", "1777", "--tmpfs", "/dev/shm"]
    shown = (*readable_paths(), *extra)
    # bubblewrap makes the folders above a shown path for its own user alone; the engine's user must pass through.
    for folder in sorted({str(parent) for path in shown for parent in Path(path).parents} - {"/", "/tmp", "/dev/shm"}):
        view += ["--perms", "0755", "--dir", folder]
    for path in shown:
        view += ["--ro-bind", path, path]
    for path, target in system_links().items():
        view += ["--symlink", target, path]
    closed = ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    life = ["--die-with-parent", "--new-session", "--as-pid-1"]
    return [program, *namespaces, *life, *rights, *view, *closed, "--"]
