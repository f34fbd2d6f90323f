"""Downloads: ranges, conditions and digests as RFC 9110 and RFC 9530 say."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow
from app.ids import new_id
from app.storage import Storage, owner_storage
from tests.app.jobs.world import World

BODY = bytes(range(256)) * 8192 + b"end"  # more than two chunks of storage
SIZE = len(BODY)


@dataclass
class Artifact:
    id: str
    url: str
    etag: str
    sha256: str


def add_artifact(world: World, storage: Storage, body: bytes, database: Database, owner: str = "local") -> Artifact:
    with owner_storage(storage, owner).writer() as writer:
        writer.write(body)
        blob = writer.commit()
    row = ArtifactRow(
        id=new_id("art"),
        job_id=world.submit(),
        owner=owner,
        name="model.onnx",
        media_type="application/octet-stream",
        size_bytes=blob.size_bytes,
        sha256=blob.sha256,
        epoch=1,
        created_at=db_now(),
    )
    with database.session() as session:
        session.add(row)
    return Artifact(row.id, f"/v1/artifacts/{row.id}", f'"sha256-{blob.sha256}"', blob.sha256)


@pytest.fixture
def artifact(world: World, storage: Storage, sqlite_database: Database) -> Artifact:
    return add_artifact(world, storage, BODY, sqlite_database)


def test_whole_file(client: TestClient, artifact: Artifact) -> None:
    answer = client.get(artifact.url)
    assert (answer.status_code, answer.content) == (200, BODY)
    assert answer.headers["etag"] == artifact.etag
    digest = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["content-disposition"] == 'attachment; filename="model.onnx"'
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=5-9"}])
def test_head_has_the_headers_of_get_and_no_body(
    client: TestClient, artifact: Artifact, headers: dict[str, str]
) -> None:
    head, get = client.head(artifact.url, headers=headers), client.get(artifact.url, headers=headers)
    assert (head.status_code, head.content) == (get.status_code, b"")
    varying = {"x-request-id", "date", "ratelimit"}
    assert {k: v for k, v in head.headers.items() if k not in varying} == {
        k: v for k, v in get.headers.items() if k not in varying
    }


@pytest.mark.parametrize(
    ("value", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=-3", SIZE - 3, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),  # more than there is: all
        (f"bytes=10-{SIZE * 2}", 10, SIZE),  # beyond the end: up to it
        ("bytes=1048575-1048577", 1048575, 1048578),  # across two chunks
        ("BYTES=1-2", 1, 3),  # units are case-insensitive
    ],
)
def test_one_range(client: TestClient, artifact: Artifact, value: str, start: int, end: int) -> None:
    answer = client.get(artifact.url, headers={"Range": value})
    assert (answer.status_code, answer.content) == (206, BODY[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["repr-digest"] == client.head(artifact.url).headers["repr-digest"]
    assert answer.headers["etag"] == artifact.etag


@pytest.mark.parametrize("value", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
def test_range_outside_is_416_with_the_size(client: TestClient, artifact: Artifact, value: str) -> None:
    answer = client.get(artifact.url, headers={"Range": value})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "value",
    [
        "bytes=",
        "bytes=-",
        "bytes=5-2",
        "bytes=a-b",
        "bytes",
        "lines=1-2",
        "bytes=0-1,5-6",
        "bytes=" + ",".join(f"{i}-{i}" for i in range(2000)),
        "bytes=0-" + "9" * 5000,
    ],
)
def test_other_ranges_are_ignored(client: TestClient, artifact: Artifact, value: str) -> None:
    answer = client.get(artifact.url, headers={"Range": value})
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": "ETAG"}, 304),
        ({"If-None-Match": "W/ETAG"}, 304),  # weak comparison
        ({"If-None-Match": '"x", ETAG, "y"'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"x"'}, 200),
        ({"If-None-Match": "ETAG", "Range": "bytes=0-1"}, 304),  # the condition comes first
        ({"If-Match": "ETAG"}, 200),
        ({"If-Match": '"x", ETAG'}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": '"x"'}, 412),
        ({"If-Match": "W/ETAG"}, 412),  # strong comparison
        ({"If-Match": '"x"', "If-None-Match": "ETAG"}, 412),
        ({"If-Range": "ETAG", "Range": "bytes=0-1"}, 206),
        ({"If-Range": '"x"', "Range": "bytes=0-1"}, 200),
        ({"If-Range": "W/ETAG", "Range": "bytes=0-1"}, 200),
        ({"If-Range": "Wed, 21 Oct 2015 07:28:00 GMT", "Range": "bytes=0-1"}, 200),
        ({"If-Range": '"x"', "Range": f"bytes={SIZE}-"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_conditions(client: TestClient, artifact: Artifact, method: str, headers: dict[str, str], status: int) -> None:
    filled = {name: value.replace("ETAG", artifact.etag) for name, value in headers.items()}
    answer = client.request(method, artifact.url, headers=filled)
    assert answer.status_code == status
    if status == 304:
        assert answer.content == b""
        assert answer.headers["etag"] == artifact.etag
    if status == 412 and method == "GET":
        assert answer.json()["code"] == "precondition_failed"


def test_empty_file(client: TestClient, world: World, storage: Storage, sqlite_database: Database) -> None:
    empty = add_artifact(world, storage, b"", sqlite_database)
    answer = client.get(empty.url)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
    assert client.get(empty.url, headers={"Range": "bytes=0-"}).status_code == 416


def test_rotten_bytes_never_look_complete(live: httpx2.Client, artifact: Artifact, tmp_path: Path) -> None:
    (path,) = (tmp_path / "store" / "blobs" / "owners" / "local").rglob(artifact.sha256)
    rotten = bytearray(BODY)
    rotten[7] ^= 1
    path.write_bytes(rotten)
    with pytest.raises(httpx2.RemoteProtocolError):
        live.get(artifact.url)


def test_a_file_deleted_on_its_way_arrives_whole_or_not_at_all(
    live: httpx2.Client, world: World, storage: Storage, sqlite_database: Database
) -> None:
    body = BODY * 8  # more than the buffers between here and there hold
    artifact = add_artifact(world, storage, body, sqlite_database)
    with live.stream("GET", artifact.url) as answer:
        pieces = answer.iter_bytes(65536)
        got = next(pieces)
        owner_storage(storage, "local").delete(artifact.sha256)
        add_artifact(world, storage, body[::-1], sqlite_database)
        got += b"".join(pieces)
    assert hashlib.sha256(got).hexdigest() == artifact.sha256
    assert live.get(artifact.url).status_code == 503


def test_lost_bytes_are_503(client: TestClient, artifact: Artifact, storage: Storage) -> None:
    owner_storage(storage, "local").delete(artifact.sha256)
    answer = client.get(artifact.url)
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "blob_missing", False)


def test_artifacts_of_a_job(client: TestClient, world: World, artifact: Artifact, sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        row = session.get(ArtifactRow, artifact.id)
    assert row is not None
    (item,) = client.get(f"/v1/jobs/{row.job_id}/artifacts").json()["items"]
    assert item["links"]["self"] == artifact.url
    assert (item["name"], item["size_bytes"], item["sha256"]) == ("model.onnx", SIZE, artifact.sha256)
    assert client.get(f"/v1/jobs/{world.submit()}/artifacts").json() == {"items": []}


def test_artifacts_of_others_are_not_there(
    client: TestClient, world: World, storage: Storage, sqlite_database: Database
) -> None:
    theirs = add_artifact(world, storage, BODY, sqlite_database, owner="somebody else")
    assert client.get(theirs.url).status_code == 404


def test_range_on_a_socket(live: httpx2.Client, artifact: Artifact) -> None:
    first = live.get(artifact.url, headers={"Range": "bytes=0-999999"})
    rest = live.get(artifact.url, headers={"Range": "bytes=1000000-", "If-Range": first.headers["etag"]})
    assert hashlib.sha256(first.content + rest.content).hexdigest() == artifact.sha256
