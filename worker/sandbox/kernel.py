"""Linux calls that the standard library lacks: mounts, Landlock, no-new-privileges, capabilities, seccomp."""

import ctypes
import fcntl
import os
import platform
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same everywhere

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_RECURSIVE = 0x8000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 4, 24, 28
_PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 22, 36, 38
_SECUREBITS_ALL_LOCKED = 0x2F  # NOROOT, NO_SETUID_FIXUP and KEEP_CAPS off, each locked


def _check(result: int, call: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")
    return result


def _syscall(call: str, number: int, *arguments: object) -> int:
    return _check(int(_libc.syscall(number, *arguments)), call)


def _prctl(call: str, option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _check(int(_libc.prctl(option, *padded)), call)


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the THREAD that started it ends."""
    _prctl("prctl(PDEATHSIG)", _PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl("prctl(CHILD_SUBREAPER)", _PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """No program started from here gains rights, whatever its file mode says."""
    _prctl("prctl(NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)


def forbid_tracing() -> None:
    """Processes of the same user may not attach to this one or read its memory."""
    _prctl("prctl(DUMPABLE)", _PR_SET_DUMPABLE, 0)


def drop_capabilities() -> None:
    """Give up all capabilities for good, also those that user 0 would get back by starting a program."""
    for capability in range(64):
        try:
            _prctl("prctl(CAPBSET_DROP)", _PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one that this kernel knows
    _prctl("prctl(SECUREBITS)", _PR_SET_SECUREBITS, _SECUREBITS_ALL_LOCKED)
    header = struct.pack("Ii", 0x20080522, 0)
    _check(int(_libc.capset(header, struct.pack("6I", *[0] * 6))), "capset")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Call mount(2)."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(int(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])), f"mount {target}")


def bind(source: str, target: str, *, writable: bool, devices: bool = False) -> None:
    """Show `source`, with all that is mounted below it, at `target`; never with set-user-id programs."""
    mount(source, target, None, MS_BIND | MS_REC)
    limit_mount(target, _ATTR_NOSUID | (0 if writable else _ATTR_RDONLY) | (0 if devices else _ATTR_NODEV))


def limit_mount(target: str, attributes: int = _ATTR_RDONLY, *, recursive: bool = True) -> None:
    """Make a mount, and those below it, read-only or otherwise poorer."""
    request = struct.pack("4Q", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _syscall(f"mount_setattr {target}", _MOUNT_SETATTR, -100, os.fsencode(target), flags, request, len(request))


def enter_root(directory: str) -> None:
    """Make `directory` the root of this mount namespace and forget the old one."""
    os.chdir(directory)
    _syscall("pivot_root", _PIVOT_ROOT[platform.machine()], b".", b".")
    _check(int(_libc.umount2(b".", _MNT_DETACH)), "umount2")
    os.chdir("/")


def raise_loopback() -> None:
    """Switch on the loopback interface of this network namespace, which begins switched off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = bytearray(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0)))
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, bytes(request))


def has_only_loopback() -> bool:
    """Whether this network namespace has no interface but its own loopback."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def landlock_version() -> int:
    """Return the Landlock version of this kernel, 0 where it is off."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1)))


def restrict_files(listed: list[str], read: list[str], write: list[str], *, tcp: bool) -> None:
    """With Landlock: below `listed` only names may be seen, below `read` files may be read and run, below `write` also
    changed; no other path, no TCP unless `tcp`, and no signal or abstract socket to the outside."""
    version = landlock_version()
    if version == 0:
        raise OSError("Landlock is not available")
    files = (1 << 13) - 1
    files |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    listing, reading = 0b1000, 0b1101  # read directory; execute, read file, read directory
    network, scope = (3 if version >= 4 and not tcp else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("3Q", files, network, scope)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _syscall("landlock_create_ruleset", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    for paths, allowed in ((listed, listing), (read, reading), (write, files)):
        for path in paths:
            if not os.path.exists(path):  # noqa: PTH110 - pathlib costs 10 ms at start
                continue
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # Rights that only make sense for directories are refused for a single file.
            granted = allowed if os.path.isdir(path) else allowed & 0b1100_0000_0000_0111  # noqa: PTH112
            _syscall(f"landlock_add_rule {path}", _LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", granted, handle), 0)
            os.close(handle)
    _syscall("landlock_restrict_self", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def install_filter(program: bytes) -> None:
    """Install a seccomp filter: an array of BPF instructions of 8 bytes."""
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    _check(int(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), header, 0, 0)), "prctl(SECCOMP)")
