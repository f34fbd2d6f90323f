"""The seccomp filter of a sandbox: kernel calls that an engine never needs, and that kernel exploits begin with."""

import errno
import platform
import struct

_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag that clone takes
_X32_BIT = 0x40000000
_CLONE3 = 435  # its flags are behind a pointer: refused, and libc falls back to clone

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_FAMILIES = (1, 2, 10, 16)
"""Unix, IPv4, IPv6, netlink. A network namespace ends where these do: a vsock, for one, reaches the host of a virtual
machine from any namespace."""
_REFUSED = {
    # ptrace, mount family, modules, keys, bpf, perf, userfaultfd, io_uring, namespaces, kexec, reboot, swap, ...
    "x86_64": (101, 155, 165, 166, 167, 168, 169, 172, 173, 175, 176, 246, 248, 249, 250, 272, 298, 303, 304, 308, 310,
               311, 313, 320, 321, 323),
    "aarch64": (39, 40, 41, 89, 97, 104, 105, 106, 117, 142, 217, 218, 219, 224, 225, 241, 264, 265, 268, 270, 271,
                273, 280, 282, 294),
}  # fmt: skip
_REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442)  # io_uring, the new mount calls


def _step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, jump_true, jump_false, value)


def build_filter() -> bytes | None:
    """Return the filter as BPF for this machine, None where its call numbers are not known."""
    machine = platform.machine()
    if machine not in _AUDIT:
        return None
    refuse = _step(_RETURN, _ERRNO | errno.EPERM)
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_JUMP_EQUAL, _AUDIT[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_JUMP_ANY_BIT, _X32_BIT, 0, 1),
        refuse,
        _step(_JUMP_EQUAL, _CLONE3, 0, 1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for number in (*_REFUSED[machine], *_REFUSED_EVERYWHERE):
        steps += [_step(_JUMP_EQUAL, number, 0, 1), refuse]
    steps += [
        _step(_JUMP_EQUAL, _CLONE[machine], 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        refuse,
        _step(_RETURN, _ALLOW),
        _step(_JUMP_EQUAL, _SOCKET[machine], 0, len(_FAMILIES) + 2),
        _step(_LOAD, _FIRST_ARGUMENT),
        *(_step(_JUMP_EQUAL, family, len(_FAMILIES) - index) for index, family in enumerate(_FAMILIES)),
        _step(_RETURN, _ERRNO | errno.EAFNOSUPPORT),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(steps)
