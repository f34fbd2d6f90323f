"""The service with its files in a bucket: the same uploads, and downloads by a link that is good for a while."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from starlette.testclient import TestClient

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow
from app.files.collect import collect
from app.ids import new_id
from app.main import create_app
from app.settings import Settings
from app.storage import open_storage, owner_storage
from tests.app.api.test_resumable import CONTENT, SHA256, begin, complete, send
from tests.app.jobs.world import OWNER, World
from tests.canaries import STORE


@pytest.fixture
def settings(settings: Settings, s3_url: str) -> Settings:
    return settings.model_copy(update={"storage_url": s3_url})


@pytest.fixture
def artifact_url(world: World, settings: Settings, sqlite_database: Database) -> str:
    blob = owner_storage(open_storage(settings.storage_url), OWNER).writer()
    with blob as writer:
        writer.write(CONTENT)
        stored = writer.commit()
    row = ArtifactRow(
        id=new_id("art"), job_id=world.submit(), owner=OWNER, name="model.onnx", media_type="application/octet-stream",
        size_bytes=stored.size_bytes, sha256=stored.sha256, epoch=1, created_at=db_now(),
    )  # fmt: skip
    with sqlite_database.session() as session:
        session.add(row)
    return f"/v1/artifacts/{row.id}"


@pytest.fixture
def own(settings: Settings) -> Iterator[TestClient]:
    """A client of a service that sends the bytes itself."""
    with TestClient(create_app(settings.model_copy(update={"download_link_seconds": 0}))) as client:
        yield client


def test_plain_and_resumable_uploads_arrive_and_leave(
    client: TestClient, settings: Settings, sqlite_database: Database
) -> None:
    plain = client.post("/v1/models", content=b"abc").json()
    assert plain["sha256"] == hashlib.sha256(b"abc").hexdigest()
    url = begin(client)
    assert send(client, url, 0, CONTENT[:1_000_000]).status_code == 204
    assert send(client, url, 1_000_000, CONTENT[1_000_000:]).status_code == 204
    assert complete(client, url, sha256="0" * 64).status_code == 460
    assert complete(client, url).json()["sha256"] == SHA256
    storage = open_storage(settings.storage_url)
    assert sorted(blob.size_bytes for blob in owner_storage(storage, OWNER).blobs()) == [3, len(CONTENT)]
    assert list(storage.sections()) == [f"owners/{OWNER}"]
    assert not collect(sqlite_database, storage, 0)


def test_download_is_a_link_that_ends_and_takes_ranges(client: TestClient, artifact_url: str) -> None:
    answer = client.get(artifact_url, follow_redirects=False)
    assert (answer.status_code, answer.content) == (307, b"")
    assert answer.headers["etag"] == f'"sha256-{SHA256}"'
    assert answer.headers["cache-control"] == "no-store"
    link = answer.headers["location"]
    query = parse_qs(urlsplit(link).query)
    assert query["X-Amz-Expires"] == ["300"]
    assert query["X-Amz-Signature"]
    assert STORE not in link
    with urllib.request.urlopen(link, timeout=10) as whole:
        assert whole.read() == CONTENT
    part = urllib.request.Request(link, headers={"Range": "bytes=100-199"})
    with urllib.request.urlopen(part, timeout=10) as ranged:
        assert (ranged.status, ranged.read()) == (206, CONTENT[100:200])


def test_conditions_and_head_are_answered_without_the_store(client: TestClient, artifact_url: str) -> None:
    head = client.head(artifact_url, follow_redirects=False)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(CONTENT)))
    known = client.get(artifact_url, headers={"If-None-Match": head.headers["etag"]}, follow_redirects=False)
    assert known.status_code == 304
    other = client.get(artifact_url, headers={"If-Match": '"other"'}, follow_redirects=False)
    assert other.status_code == 412


def test_no_link_leads_to_what_is_gone(client: TestClient, settings: Settings, artifact_url: str) -> None:
    owner_storage(open_storage(settings.storage_url), OWNER).delete(SHA256)
    answer = client.get(artifact_url, follow_redirects=False)
    assert (answer.status_code, answer.json()["code"]) == (503, "blob_missing")


def test_service_sends_the_bytes_itself_where_it_is_told_to(own: TestClient, artifact_url: str) -> None:
    answer = own.get(artifact_url, follow_redirects=False)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    answer = own.get(artifact_url, headers={"Range": "bytes=-5"}, follow_redirects=False)
    assert (answer.status_code, answer.content) == (206, CONTENT[-5:])


def test_store_that_is_away_is_503_without_its_address(settings: Settings) -> None:
    url = "s3://bucket/x?endpoint=http://127.0.0.1:9"
    with TestClient(create_app(settings.model_copy(update={"storage_url": url}))) as client:
        answer = client.post("/v1/models", content=b"abc")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "127.0.0.1" not in answer.text
        assert client.get("/v1/models").status_code == 200
