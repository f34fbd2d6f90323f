"""The nginx of docker/nginx.conf in front of an API of the tests: that file, with the ports and places of a test."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_nginx = pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")
SENT_BY = "X-Sent-By"
"""On answers whose bytes nginx found in a file itself; only in the tests."""


@contextmanager
def run_nginx(directory: Path, api_url: str, blobs: Path) -> Iterator[str]:
    """Run nginx in a directory of its own, in front of an API; it finds files in `blobs`. Yield its URL."""
    assert PROGRAM is not None
    directory.mkdir()
    # It inherits a socket that listens, as from an nginx that it replaces: no port is chosen that another takes.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        text = (ROOT / "docker/nginx.conf").read_text(encoding="utf-8")
        for before, after in {
            " /tmp/": f" {directory}/",
            "server api:8000;": f"server {api_url.removeprefix('http://')};",
            "listen 8080;": f"listen 127.0.0.1:{port};",
            "alias /var/lib/pare/store/blobs/;": f"alias {blobs}/; add_header {SENT_BY} nginx;",
        }.items():
            assert before in text, before
            text = text.replace(before, after)
        if os.geteuid() == 0:
            text = f"user root;\n{text}"  # the files are this user's
        (directory / "nginx.conf").write_text(text, encoding="utf-8")
        process = subprocess.Popen(
            [PROGRAM, "-e", "error.log", "-p", str(directory), "-c", "nginx.conf", "-g", "daemon off;"],
            env={"NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(10)
    assert status == 0, (directory / "error.log").read_text(encoding="utf-8")
