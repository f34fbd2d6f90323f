"""Ways out of a sandbox that kernels have offered, each tried from inside by its number."""

import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.sandbox.detect import detect
from worker.sandbox.isolation import Isolation, Limits
from worker.sandbox.launch import remove_directory, start

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of calls differ by machine")
LIMITS = Limits(memory_bytes=2**30, file_bytes=2**20, num_processes=40, num_files=64)
CALLS = {
    "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155, "unshare": 272, "setns": 308, "reboot": 169,
    "swapon": 167, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
    "kexec_file_load": 320, "add_key": 248, "request_key": 249, "keyctl": 250, "perf_event_open": 298,
    "open_by_handle_at": 304, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "userfaultfd": 323,
    "bpf": 321, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442, "fanotify_init": 300, "acct": 163,
    "settimeofday": 164, "sethostname": 170, "iopl": 172, "ioperm": 173, "quotactl": 179, "lookup_dcookie": 212,
    "chroot": 161, "vhangup": 153, "syslog": 103, "pidfd_getfd": 438, "process_madvise": 440,
}  # fmt: skip
NEEDS_AN_OBJECT = ("chroot", "kcmp", "pidfd_getfd", "process_madvise", "quotactl")
"""These look at their arguments first, and only reach processes and files that the engine has anyway."""
NAMESPACES = {name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("pid", "mnt", "net", "ipc", "uts")}
CODE = """
import ctypes, json, os, socket, sys
calls, unix, abstract, outer = json.loads(sys.argv[1])
for name, theirs in outer.items():
    if os.readlink(f"/proc/self/ns/{name}") == theirs:
        sys.exit(f"nothing is tried in the {name} namespace of the tests")
libc = ctypes.CDLL(None, use_errno=True)
found = {}
for name, number in calls.items():
    ctypes.set_errno(0)
    found[name] = os.strerror(ctypes.get_errno()) if libc.syscall(number, 0, 0, 0, 0, 0) < 0 else "DONE"
def tried(act):
    try:
        act()
        return "DONE"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
for family in (17, 38, 40, 44):
    found[f"socket family {family}"] = tried(lambda: socket.socket(family, socket.SOCK_DGRAM if family != 38 else 5))
for name, address in (("unix socket", unix), ("abstract socket", "\\0" + abstract)):
    found[name] = tried(lambda: socket.socket(socket.AF_UNIX).connect(address))
found["cloud metadata"] = tried(lambda: socket.create_connection(("169.254.169.254", 80), 2))
found["name server"] = tried(lambda: socket.getaddrinfo("example.com", 80))
found["raw socket"] = tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/dev/mem", "/dev/kmsg", "/sys/kernel/x",
             "/proc/1/environ", "/proc/1/mem", "/proc/1/root/etc/shadow", "/proc/1/fd/0", "/etc/passwd"):
    found[path] = tried(lambda: os.open(path, os.O_RDWR))
    if path.startswith("/proc/1/"):
        found[f"read {path}"] = tried(lambda: os.open(path, os.O_RDONLY))
found["hard link"] = tried(lambda: os.link("/usr/bin/env", "/tmp/env"))
found["device"] = tried(lambda: os.mknod("/tmp/device", 0o020666, os.makedev(1, 1)))
found["set-user-id"] = "".join(oct(os.stat(path).st_mode) for path in ("/tmp",) if os.stat(path).st_mode & 0o6000)
found["handles"] = sorted(int(name) for name in os.listdir("/proc/self/fd"))
print(json.dumps(found))
"""


@pytest.fixture(params=["bubblewrap", "namespaces"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    found = detect(request.param)
    if found.method != request.param:
        pytest.skip(f"{request.param} does not work on this machine: {found.problems}")
    return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "job"
    remove_directory(tmp_path / "job")


def test_no_call_that_exploits_begin_with_is_granted(isolation: Isolation, job: Path, tmp_path: Path) -> None:
    abstract = f"pare-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as hidden:
        unix.bind(str(tmp_path / "s"))
        hidden.bind(f"\0{abstract}")
        for each in (unix, hidden):
            each.listen()
        given = json.dumps([CALLS, str(tmp_path / "s"), abstract, NAMESPACES])
        sandbox = start(isolation, job, [sys.executable, "-S", "-c", CODE, given], LIMITS)
        output, errors = sandbox.process.communicate(timeout=60)
        sandbox.kill(isolation.isolates)
    assert output, errors
    found = json.loads(output)
    assert found.pop("handles") in ([0, 1, 2], [0, 1, 2, 3]), "nothing of the worker is left open"
    assert found.pop("set-user-id") == ""
    assert {name: how for name, how in found.items() if how == "DONE"} == {}
    filtered = {name: how for name, how in found.items() if name in CALLS and name not in NEEDS_AN_OBJECT}
    refused = {"Operation not permitted", "Function not implemented"}
    assert {name: how for name, how in filtered.items() if how not in refused} == {}
