"""The nginx of docker/nginx.conf in front of an API of the tests: that file, with the ports and places of a test."""

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_nginx = pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")
SENT_BY = "X-Sent-By"
"""On answers whose bytes nginx found in a file itself; only in the tests."""


@contextmanager
def run_nginx(directory: Path, api_url: str, blobs: Path, *, tls: bool = False) -> Iterator[str]:
    """Run nginx in a directory of its own, in front of an API; it finds files in `blobs`. Yield its URL.

    With `tls` it speaks that instead, by the lines which the file has ready, and `pare.pem` in the directory is its
    certificate.
    """
    assert PROGRAM is not None
    directory.mkdir()
    # It inherits a socket that listens, as from an nginx that it replaces: no port is chosen that another takes.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        text = (ROOT / "docker/nginx.conf").read_text(encoding="utf-8")
        if tls:
            make_certificate(directory)
            text = re.sub(r"^( +)# (listen|ssl_)", r"\1\2", text.replace("listen 8080;", ""), flags=re.MULTILINE)
        for before, after in {
            " /tmp/": f" {directory}/",
            "/etc/nginx/tls/": f"{directory}/",
            "server api:8000;": f"server {api_url.removeprefix('http://')};",
            "listen 8443" if tls else "listen 8080": f"listen 127.0.0.1:{port}",
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
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(10)
    assert status == 0, (directory / "error.log").read_text(encoding="utf-8")


def make_certificate(directory: Path) -> None:
    """Write pare.pem and pare.key: good for 127.0.0.1 and an hour, and signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "pare.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "pare.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
