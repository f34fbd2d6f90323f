"""Start a command in a sandbox around one job directory, and hold the ties to it."""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from worker.sandbox import bubblewrap, namespaces
from worker.sandbox.isolation import Isolation, Limits
from worker.sandbox.layout import PROJECT, environment, readable_paths, system_links

JOB = "/job"
_FIRST_USER, _NUM_USERS = 61184, 4336  # the range that systemd sets aside for users without a name
_END_SECONDS = 5.0


class SandboxProcess:
    """A running sandbox. `terminate` asks, `kill` ends everything in it; neither needs to know process ids inside."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: int) -> None:
        self.process = process
        self._control: int | None = control

    @property
    def pid(self) -> int:
        """The outermost process."""
        return self.process.pid

    def terminate(self) -> None:
        """Send SIGTERM to the engine."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                os.write(self._control, b"T")

    def kill(self, isolated: bool) -> int:
        """End every process of the sandbox and return the exit status."""
        if self._control is not None:
            os.close(self._control)
            self._control = None
        if not isolated:
            # There is no namespace that the kernel would empty for us: let the launcher kill what it adopted.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECONDS)
        # bubblewrap's child waits for bubblewrap to set it up before the kernel ties them: in the first milliseconds
        # it would wait for ever.
        children = _hold_children(self.process) if isolated else []
        self.process.kill()
        status = self.process.wait()
        for child in children:
            with contextlib.suppress(OSError):  # it has ended already
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)
        return status

    def exit_status(self) -> int | None:
        """Return None while it runs, then the engine's status; 128 + n when signal n ended it."""
        status = self.process.poll()
        return status if status is None or status >= 0 else 128 - status


def _hold_children(process: "subprocess.Popen[bytes]") -> list[int]:
    """Stop a process, so that it makes no more children, and return descriptors of those it has."""
    held: list[int] = []
    with contextlib.suppress(OSError):  # it may end, and be waited for, at any moment
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                held.append(os.pidfd_open(int(child)))
    return held


def make_directories(directory: Path, isolation: Isolation) -> int | None:
    """Make the job directory's parts with the owners they need; return the engine's user, None for our own."""
    user = None
    if isolation.own_user:
        digest = hashlib.sha256(os.fsencode(directory)).digest()
        user = _FIRST_USER + int.from_bytes(digest[:4], "big") % _NUM_USERS
    directory.mkdir(parents=True, mode=0o700)
    for name in ("in", "out", "tmp", "root"):
        part = directory / name
        part.mkdir()
        # What is shown as /tmp must be passed through on the way to a Python that lies below it.
        part.chmod({"in": 0o755, "root": 0o755, "tmp": 0o711}.get(name, 0o700))
    if user is not None:
        os.chown(directory / "out", user, user)
        os.chown(directory / "tmp", user, user)
    return user


def start(
    isolation: Isolation,
    directory: Path,
    command: Sequence[str],
    limits: Limits,
    *,
    num_threads: int | None = None,
    extra_readable: Sequence[Path] = (),
    visible_devices: Sequence[str] = (),
    device_nodes: Sequence[str] = (),
    library_folders: Sequence[Path] = (),
    loopback: bool = False,
) -> SandboxProcess:
    """Start `command` around a new job directory. In it, the text "{job}" stands for the directory's path inside.

    `visible_devices` are the GPUs that CUDA shows it, `device_nodes` the paths below /dev to reach them,
    `library_folders` those of the driver that the linker does not know; they are shown if `extra_readable` says so.
    With `loopback` its processes may talk to each other over TCP, where they have a network of their own.
    The kernel ties the sandbox's life to the calling THREAD: call from one that lives as long as the sandbox may.
    """
    job = str(directory.resolve())
    user = make_directories(directory, isolation)
    inside = JOB if isolation.isolates else job
    scratch = "/tmp" if isolation.isolates else f"{job}/tmp"
    extra = tuple(str(path.resolve()) for path in extra_readable)
    read = [*readable_paths(), *extra]
    control_read, control_write = os.pipe()
    confined = isolation.method == "namespaces"
    # NCCL lets GPUs write into /dev/shm, which the kernel allows in memory and not in a file on a disk.
    in_memory = loopback and bool(device_nodes)
    root = {
        "mount_on": f"{job}/root", "read": read, "links": system_links(), "job": job, "devices": list(device_nodes),
        "shm_in_memory": in_memory,
    }  # fmt: skip
    spec = {
        "root": {**root, "shared_proc": isolation.shared_proc} if confined else None,
        "outside": _own_namespaces() if isolation.isolates else {},
        "user": user,
        "limits": limits.as_rlimits(isolation),
        "landlock": _landlock(read, inside, isolation, device_nodes) if isolation.landlock else None,
        "seccomp": isolation.seccomp,
        "loopback": loopback and isolation.isolates,
        "drop_capabilities": user is None and (confined or (isolation.method == "none" and os.getuid() == 0)),
        "linux": isolation.linux,
        "control": control_read,
    }
    line = [sys.executable, "-S", "-m", "worker.sandbox.launcher", json.dumps(spec)]
    line += [word.replace("{job}", inside) for word in command]
    if isolation.method == "bubblewrap":
        line = [*bubblewrap.wrap(isolation, job, extra, device_nodes, shm_in_memory=in_memory), *line]
    elif confined:
        line = [*namespaces.wrap(isolation), *line]
    try:
        process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(scratch, num_threads, visible_devices, library_folders),
            cwd="/",
            pass_fds=(control_read,),
            start_new_session=True,
            bufsize=0,
        )
    except BaseException:
        os.close(control_write)
        raise
    finally:
        os.close(control_read)
    return SandboxProcess(process, control_write)


def _own_namespaces() -> dict[str, str]:
    """Return the namespaces that a sandbox must not share with us."""
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "pid", "net", "ipc", "uts")}  # noqa: PTH115


def _landlock(read: list[str], inside: str, isolation: Isolation, device_nodes: Sequence[str]) -> dict[str, list[str]]:
    own = [f"{inside}/out", f"{inside}/tmp"]
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "shm")]
    scratch = ["/tmp", *devices] if isolation.isolates else devices[:-1]
    # Python lists every folder of its path. Where a mount namespace hides the rest, all that is left may be listed.
    listed = ["/"] if isolation.isolates else [str(PROJECT)]
    return {"listed": listed, "read": [*read, "/proc", f"{inside}/in"], "write": [*own, *scratch, *device_nodes]}


def remove_directory(directory: Path) -> None:
    """Remove a job directory, whatever was left in it: locked folders, or deeper ones than a path can name."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            _empty(directory)
            directory.rmdir()
        if not directory.exists():
            return
        time.sleep(0.05)


def _empty(directory: Path) -> None:
    """Move each folder up until none has another below it: no recursion, no long path, no link ever followed."""
    folders = [directory]
    while folders:
        folder = folders.pop()
        if not stat.S_ISDIR(folder.lstat().st_mode):  # it was exchanged before it came up here, out of reach
            folder.unlink()
            continue
        with list_folder(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)  # noqa: PTH108 - an engine can leave a million of them
                elif folder == directory:
                    folders.append(Path(entry.path))
                else:
                    raised = directory / secrets.token_hex(8)
                    _rename(entry.path, raised)
                    folders.append(raised)
        if folder != directory:
            folder.rmdir()


def list_folder(folder: Path) -> contextlib.AbstractContextManager[Iterator[os.DirEntry[str]]]:
    """Open a folder for listing, also one that an engine of our own user has locked."""
    try:
        return os.scandir(folder)
    except PermissionError:
        _unlock(folder)
        return os.scandir(folder)


def _rename(source: str, target: Path) -> None:
    try:
        os.rename(source, target)  # noqa: PTH104
    except PermissionError:
        _unlock(source)
        os.rename(source, target)  # noqa: PTH104


def _unlock(folder: str | Path) -> None:
    """Let us into a folder of our own whose mode keeps us out, but never into what a link points at."""
    handle = os.open(folder, (os.O_PATH if sys.platform == "linux" else 0) | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        os.chmod(f"/proc/self/fd/{handle}" if sys.platform == "linux" else folder, 0o700)  # noqa: PTH101
    finally:
        os.close(handle)
