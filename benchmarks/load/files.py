"""How fast large files come in, against a copy through `sha256sum`, and go out, against nginx."""

import hashlib
import os
import secrets
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import update

from app.db.tables import ArtifactRow
from app.storage import open_storage, owner_storage
from benchmarks.load.client import make_request, read_answer
from benchmarks.load.rates import describe_ratio
from benchmarks.load.world import World
from tests.nginx import SENT_BY

MIB = 1024 * 1024
UPLOAD_TARGET, DOWNLOAD_TARGET = 0.7, 0.8


@dataclass(frozen=True)
class Way:
    """One way for a file's bytes."""

    name: str
    move: Callable[[int], None]
    """Move the file of this number."""
    versus: str = ""
    target: float | None = None


def measure_files(world: World, mebibytes: int, num_rounds: int) -> None:
    """Move files in and out, each way in turn, and print."""
    source = world.directory / "source"
    section = owner_storage(open_storage(world.settings.storage_url), world.owners[0].name)
    _write_noise(source, mebibytes, 0)
    blob = section.put_file(source)
    with world.database.session() as session:
        where = ArtifactRow.id == world.owners[1].artifact_id
        values = {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "owner": world.owners[0].name}
        session.execute(update(ArtifactRow).where(where).values(values))
    stored = world.directory / "store" / "blobs" / section.name / blob.sha256[:2] / blob.sha256

    def upload(number: int) -> None:
        path = f"/v1/models?name=load{number}"
        head = make_request("POST", path, world.owners[0].token).split(b"Content-Type", 1)[0]
        head += f"Content-Type: application/octet-stream\r\nContent-Length: {mebibytes * MIB}\r\n\r\n".encode()
        with source.open("rb") as file, _connect(world.ports["pare"]) as connection:
            connection.sendall(head)
            connection.sendfile(file)
            status, body = read_answer(connection)
        assert status == 201, body

    def copy(number: int) -> None:
        target = world.directory / f"copy{number}"
        _run(f"cat '{source}' | tee >(sha256sum > '{target}.sum') > '{target}'; wait $!")

    def copy_durably(number: int) -> None:
        copy(number)
        _run(f"sync '{world.directory / f'copy{number}'}'")

    url, token = f"/v1/artifacts/{world.owners[1].artifact_id}", world.owners[0].token
    artifact = make_request("GET", url, token)
    artifact_as_range = make_request("GET", url, token, b"", "Range: bytes=0-")

    def download(number: int) -> None:  # noqa: ARG001 - the same file each time
        _receive(world.ports["pare"], artifact, mebibytes * MIB)

    def download_as_range(number: int) -> None:  # noqa: ARG001
        _receive(world.ports["pare"], artifact_as_range, mebibytes * MIB)

    def download_through_nginx(number: int) -> None:  # noqa: ARG001
        head = _receive(world.ports["front"], artifact, mebibytes * MIB)
        assert SENT_BY.encode() in head, "the file was not verified lately"

    def fetch(number: int) -> None:  # noqa: ARG001
        _receive(world.ports["nginx"], make_request("GET", f"/{stored.relative_to(world.directory)}"), mebibytes * MIB)

    def digest(number: int) -> None:  # noqa: ARG001 - the same file each time
        with stored.open("rb", buffering=0) as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256

    ways = [
        Way("copy through sha256sum", copy),
        Way("copy through sha256sum, then sync", copy_durably),
        Way("upload", upload, "copy through sha256sum", UPLOAD_TARGET),
        Way("nginx", fetch),
        Way("read and hashed, not sent", digest, "nginx"),
        Way("download as a range, not hashed", download_as_range, "nginx"),
        Way("download", download, "nginx", DOWNLOAD_TARGET),
        Way("download through nginx, verified before", download_through_nginx, "nginx", DOWNLOAD_TARGET),
    ]
    speeds: dict[str, list[float]] = {way.name: [] for way in ways}
    fetch(0)  # into the page cache
    download(0)  # verified
    for number in range(num_rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            if way.move in (copy, copy_durably, upload):
                _write_noise(source, mebibytes, number)  # no two uploads are the same
                os.sync()  # nobody pays for what another left to be written
            started = time.perf_counter()
            way.move(number)
            speeds[way.name].append(mebibytes / (time.perf_counter() - started))
            for path in world.directory.glob("copy*"):
                path.unlink()
    _print(ways, speeds, mebibytes)


def _print(ways: list[Way], speeds: dict[str, list[float]], mebibytes: int) -> None:
    print(f"| a file of {mebibytes} MiB | MiB/s (of rounds: median, least-most) | ratio | target |")
    print("|---|---|---|---|")
    for way in ways:
        measured = speeds[way.name]
        ratio = target = ""
        if way.versus:
            ratios = [mine / theirs for mine, theirs in zip(measured, speeds[way.versus], strict=True)]
            ratio = f"{describe_ratio(ratios)} of {way.versus}"
            if way.target is not None:
                target = f"{way.target} {'met' if statistics.median(ratios) >= way.target else 'MISSED'}"
        shown = f"{statistics.median(measured):.0f} ({min(measured):.0f}-{max(measured):.0f})"
        print(f"| {way.name} | {shown} | {ratio} | {target} |", flush=True)


def _write_noise(path: Path, mebibytes: int, number: int) -> None:
    """Write a file that differs from every other."""
    noise = secrets.token_bytes(MIB - 16)
    with path.open("wb") as file:
        for index in range(mebibytes):
            file.write(number.to_bytes(8, "big") + index.to_bytes(8, "big") + noise)


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=300)


def _receive(port: int, request: bytes, num_bytes: int) -> bytes:
    """Send a request, drop what comes, return the head: a client that did more would be slower than either server."""
    buffer = memoryview(bytearray(MIB))
    with _connect(port) as connection:
        connection.sendall(request)
        head = b""
        while (end := head.find(b"\r\n\r\n")) < 0:
            more = connection.recv(4096)
            assert more, f"the connection was closed after {head!r}"
            head += more
        assert head[9:12] in (b"200", b"206"), head
        missing = num_bytes - (len(head) - end - 4)
        while missing > 0:
            received = connection.recv_into(buffer)
            assert received, f"{missing} bytes are missing"
            missing -= received
    return head[:end]


def _run(command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True)
