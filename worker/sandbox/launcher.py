"""The first process of a sandbox: confine itself for good, start the engine, hand it SIGTERM, die with the supervisor.

    python -S -m worker.sandbox.launcher SPEC COMMAND...

SPEC is a JSON object (worker/sandbox/launch.py writes it). Only small standard modules are imported, because this
start-up is paid by every engine. The control pipe is the tie to the supervisor: a byte on it asks for SIGTERM, its end
means that the supervisor is gone, and everything below ends. Should this process itself be killed, the kernel kills the
engine.
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
from typing import Any

from worker.sandbox import kernel
from worker.sandbox.seccomp import build_filter

_DEVICES = ("null", "zero", "full", "random", "urandom")
SETUP_FAILED = 97
"""Exit status when the sandbox could not be made."""


def build_root(
    mount_on: str,
    read: list[str],
    links: dict[str, str],
    job: str,
    shared_proc: bool,
    devices: list[str],
    shm_in_memory: bool,
) -> None:
    """Make a new root that shows system files read-only and the job's directory as /job, and enter it."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("root", mount_on, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    _show(f"{job}/in", f"{mount_on}/job/in", writable=False)
    _show(f"{job}/out", f"{mount_on}/job/out", writable=True)
    # Before what is shown read-only: Python or the project may itself lie below /tmp.
    for place in ("job/tmp", "tmp", *(() if shm_in_memory else ("dev/shm",))):
        _show(f"{job}/tmp", f"{mount_on}/{place}", writable=True)
    if shm_in_memory:
        os.makedirs(f"{mount_on}/dev/shm")  # noqa: PTH103 - pathlib costs 10 ms at start
        kernel.mount("shm", f"{mount_on}/dev/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    for path in read:
        _show(path, mount_on + path, writable=False)
    for path, target in links.items():
        os.symlink(target, mount_on + path)  # noqa: PTH211
    for device in _DEVICES:
        _show(f"/dev/{device}", f"{mount_on}/dev/{device}", writable=True, devices=True)
    for device in devices:
        _show(device, mount_on + device, writable=True, devices=True)
    if shared_proc:
        _show("/proc", f"{mount_on}/proc", writable=False)
    else:
        os.makedirs(f"{mount_on}/proc")  # noqa: PTH103 - pathlib costs 10 ms at start
        kernel.mount("proc", f"{mount_on}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.limit_mount(mount_on, recursive=False)
    kernel.enter_root(mount_on)


def _show(source: str, target: str, *, writable: bool, devices: bool = False) -> None:
    if os.path.isdir(source):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    elif os.path.exists(source):  # noqa: PTH110
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    else:
        return
    kernel.bind(source, target, writable=writable, devices=devices)


def check_namespaces(outside: dict[str, str]) -> None:
    """Raise OSError where a namespace is the supervisor's: what should have made ours did nothing.

    As root, building the sandbox's root in there would take the root from the whole machine.
    """
    shared = [name for name, link in outside.items() if os.readlink(f"/proc/self/ns/{name}") == link]  # noqa: PTH115
    if shared:
        raise OSError(f"no namespaces of its own ({', '.join(shared)}): nothing is isolated")


def confine(spec: dict[str, Any]) -> None:
    """Apply every layer the spec names to this process; all are inherited and none can be undone."""
    check_namespaces(spec["outside"])
    if spec["root"] is not None:
        build_root(**spec["root"])
    if spec["loopback"]:
        with contextlib.suppress(OSError):  # a container's root may lack the right: then no step runs in parallel
            kernel.raise_loopback()
    os.umask(0o022)
    for name, limit in spec["limits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (value, value))
    if spec["user"] is not None:
        os.setgroups([])
        os.setresgid(spec["user"], spec["user"], spec["user"])
        os.setresuid(spec["user"], spec["user"], spec["user"])
    if not spec["linux"]:
        return
    if spec["drop_capabilities"]:
        kernel.drop_capabilities()
    # The ranks of a parallel step talk over TCP, which has no authorization: only where nobody else can listen in.
    tcp = spec["loopback"] and kernel.has_only_loopback()
    kernel.forbid_new_privileges()
    kernel.forbid_tracing()
    if spec["landlock"] is not None:
        kernel.restrict_files(**spec["landlock"], tcp=tcp)
    if spec["seccomp"] and (program := build_filter()) is not None:
        kernel.install_filter(program)


def start(command: list[str], control: int) -> int:
    """Start the engine in a process group of its own and return its process id."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    try:
        if sys.platform == "linux":
            kernel.die_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                return SETUP_FAILED  # it ended before we were tied to it
        os.setpgid(0, 0)
        os.close(control)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execv(command[0], command)
    except BaseException as error:
        os.write(2, f"sandbox: cannot start {command[0]}: {error}\n".encode())
    finally:
        os._exit(SETUP_FAILED)


def guard(engine: int, control: int) -> int:
    """Wait for the engine, reap orphans, pass SIGTERM on; return its exit status, 128 + n for signal n."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    watched = [wake_read, control]
    while True:
        while (ended := _reap()) is not None:
            if ended[0] == engine:
                return ended[1]
        readable, _, _ = select.select(watched, [], [], 1.0)
        if wake_read in readable:
            os.read(wake_read, 4096)
        if control in readable:
            with contextlib.suppress(ProcessLookupError):
                if os.read(control, 1):
                    os.kill(engine, signal.SIGTERM)
                else:
                    os.killpg(engine, signal.SIGKILL)
                    watched = [wake_read]


def _reap() -> tuple[int, int] | None:
    try:
        process, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    if process == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    return process, code if code >= 0 else 128 - code


def kill_descendants() -> None:
    """Without a process namespace: end all that the engine left behind, also those that changed their session."""
    for _ in range(1000):
        with contextlib.suppress(OSError), open("/proc/thread-self/children") as listing:  # noqa: PTH123
            for child in listing.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # its own children become ours, and are met in the next round
        except ChildProcessError:
            return


def main() -> None:
    """Confine, start, guard, exit as the engine did."""
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    if spec["linux"]:
        kernel.adopt_orphans()
    try:
        confine(spec)
    except OSError as error:
        os.write(2, f"sandbox: {error}\n".encode())
        os._exit(SETUP_FAILED)
    engine = start(command, spec["control"])
    status = guard(engine, spec["control"])
    kill_descendants()
    os._exit(status)


if __name__ == "__main__":
    main()
