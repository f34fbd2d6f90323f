"""Run inside a sandbox: try what it must prevent, and print as JSON what was possible.

python -S -m worker.sandbox.probe JOB OUTSIDE_FILE PORT
"""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path


def _can_write(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.write_text("probe")
        path.unlink()
        return True
    return False


def _can_read(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir() or bool(path.read_bytes()) or True
    return False


def _can_connect(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


def _can_talk_within() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 0)) as server:
        return _can_connect(server.getsockname()[1])
    return False


def _can_read_processes() -> bool:
    own = Path("/proc/self").readlink().name
    others = [path for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != own]
    return any(_can_read(path / "environ") or _can_read(path / "root") for path in others)


def _interfaces() -> list[str]:
    with contextlib.suppress(OSError):
        return [name for _, name in socket.if_nameindex() if name != "lo"]
    return []


def _status(field: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split(":", 1)[1].strip()
    return ""


def main() -> None:
    """Print what was possible."""
    job, outside, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    linux = sys.platform == "linux"
    facts = {
        "reads_outside": _can_read(outside),
        "reads_shadow": _can_read(Path("/etc/shadow")),
        "writes_outside": _can_write(outside.parent / "written"),
        "writes_system": _can_write(Path(sys.prefix) / "probe") or _can_write(Path("/usr/probe")),
        "writes_in": _can_write(job / "in" / "probe"),
        "writes_out": _can_write(job / "out" / "probe"),
        "writes_tmp": _can_write(job / "tmp" / "probe"),
        "connects": _can_connect(port),
        "talks_within": _can_talk_within(),
        "interfaces": _interfaces(),
        "environment": sorted(os.environ),
        "processes": sum(path.name.isdigit() for path in Path("/proc").iterdir()) if linux else None,
        "reads_processes": linux and _can_read_processes(),
        "user": os.getuid(),
        "capabilities": int(_status("CapEff") or "0", 16) if linux else None,
        "no_new_privileges": _status("NoNewPrivs") == "1" if linux else None,
        "seccomp": _status("Seccomp") if linux else None,
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
