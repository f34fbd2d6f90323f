"""Resumable uploads: what is acknowledged is safe, what broke goes on, nothing but the right file comes of it."""

import base64
import hashlib
import random
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from app.api import appending
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import UploadRow
from app.files.collect import collect
from app.files.resumable import forget_uploads
from app.main import create_app
from app.settings import Settings
from app.storage import Storage, upload_storage
from tests.app.api.conftest import LIMIT_BYTES, wait_until
from tests.app.jobs.world import World

TUS = {"Tus-Resumable": "1.0.0"}
CONTENT = random.Random(0).randbytes(2_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def begin(client: Any, size_bytes: int = len(CONTENT), **headers: str) -> str:
    answer = client.post("/v1/uploads", headers={**TUS, "Upload-Length": str(size_bytes), **headers})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["location"])


def send(client: Any, url: str, offset: int, data: bytes, **headers: str) -> Any:
    described = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream", **headers}
    return client.patch(url, content=data, headers=described)


def ask(client: Any, url: str) -> int:
    answer = client.head(url, headers=TUS)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return int(answer.headers["upload-offset"])


def complete(client: Any, url: str, noun: str = "models", sha256: str = SHA256) -> Any:
    params = {"format": {"models": "pt2", "datasets": "npz"}[noun], "name": "resumed"}
    return client.post(f"/v1/{noun}", params=params, json={"upload_id": url.split("/")[-1], "sha256": sha256})


def list_files(tmp_path: Path, kind: str = "") -> list[str]:
    return sorted(path.name for path in (tmp_path / "store" / kind).rglob("*") if path.is_file())


@pytest.mark.parametrize("noun", ["models", "datasets"])
def test_file_arrives_in_parts_and_is_made_one_model_or_dataset(
    both: tuple[TestClient, World], tmp_path: Path, noun: str
) -> None:
    client, world = both
    url = begin(client)
    offset = 0
    for size in (1, 1_500_000, 900_000, 99_998):
        answer = send(client, url, offset, CONTENT[offset : offset + size])
        assert (answer.status_code, answer.content) == (204, b"")
        offset += size
        assert answer.headers["upload-offset"] == str(offset) == str(ask(client, url))
        assert answer.headers["tus-resumable"] == "1.0.0"
        assert "GMT" in answer.headers["upload-expires"]

    early = complete(client, url, noun)
    assert (early.status_code, early.json()["code"]) == (409, "upload_incomplete")
    assert send(client, url, offset, CONTENT[offset:]).status_code == 204

    made = complete(client, url, noun)
    assert made.status_code == 201
    assert made.headers["location"] == made.json()["links"]["self"]
    assert (made.json()["sha256"], made.json()["size_bytes"]) == (SHA256, len(CONTENT))
    assert (made.json()["state"], made.json()["name"]) == ("checking", "resumed")
    assert list_files(tmp_path) == [SHA256]
    (check_id,) = world.outbox()
    assert world.job(check_id).action == f"check_{noun[:-1]}"

    again = complete(client, url, noun)
    assert (again.status_code, again.json()["id"]) == (201, made.json()["id"]), "asked again, it is the same"
    names = [item["name"] for item in client.get(f"/v1/{noun}").json()["items"]]
    assert names.count("resumed") == 1
    other = complete(client, url, {"models": "datasets", "datasets": "models"}[noun])
    assert (other.status_code, other.json()["code"]) == (409, "upload_used")
    late = send(client, url, len(CONTENT), b"")
    assert (late.status_code, late.json()["code"]) == (409, "upload_complete")
    assert client.get(url).json()["made"] == made.json()["id"]


def test_abilities_are_told(client: TestClient) -> None:
    answer = client.options("/v1/uploads")
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["tus-version"] == "1.0.0"
    assert answer.headers["tus-extension"] == "creation,checksum,expiration,termination"
    assert answer.headers["tus-max-size"] == str(LIMIT_BYTES)
    assert answer.headers["tus-checksum-algorithm"] == "sha1,sha256"


@pytest.mark.parametrize("version", [None, "0.2.2", "1.0"])
def test_other_versions_are_412(client: TestClient, version: str | None) -> None:
    url = begin(client, 10)
    given = {"Tus-Resumable": version} if version else {}
    for method, place in (("POST", "/v1/uploads"), ("HEAD", url), ("PATCH", url), ("DELETE", url)):
        answer = client.request(method, place, headers={"Upload-Length": "1", "Upload-Offset": "0", **given})
        assert answer.status_code == 412, method
        assert answer.headers["tus-version"] == answer.headers["tus-resumable"] == "1.0.0"
    assert ask(client, url) == 0


def test_description_comes_back(client: TestClient) -> None:
    text = "filename bmV0LnB0Mg==,is_draft"
    url = begin(client, 1, **{"Upload-Metadata": text})
    assert client.head(url, headers=TUS).headers["upload-metadata"] == text
    bad = client.post("/v1/uploads", headers={**TUS, "Upload-Length": "1", "Upload-Metadata": "filename net.pt2"})
    assert (bad.status_code, bad.json()["errors"][0]["pointer"]) == (422, "header:Upload-Metadata")


@pytest.mark.parametrize(("length", "status"), [("0", 422), ("-1", 422), ("x", 422), (str(LIMIT_BYTES + 1), 413)])
def test_lengths_that_cannot_be(client: TestClient, length: str, status: int) -> None:
    assert client.post("/v1/uploads", headers={**TUS, "Upload-Length": length}).status_code == status


def test_bytes_for_another_place_are_409_with_the_right_one(client: TestClient) -> None:
    url = begin(client)
    send(client, url, 0, CONTENT[:1000])
    for offset in (0, 999, 1001):
        answer = send(client, url, offset, CONTENT[1000:2000])
        assert (answer.status_code, answer.json()["code"]) == (409, "offset_mismatch")
        assert answer.headers["upload-offset"] == "1000"
    assert ask(client, url) == 1000


def test_other_media_types_are_415(client: TestClient) -> None:
    url = begin(client)
    answer = send(client, url, 0, b"x", **{"Content-Type": "application/octet-stream"})
    assert answer.status_code == 415
    assert "application/offset+octet-stream" in answer.json()["fix"]


def test_more_than_the_length_ends_the_upload(client: TestClient, tmp_path: Path) -> None:
    url = begin(client, 10)
    send(client, url, 0, b"12345")
    answer = send(client, url, 5, b"678901")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert client.head(url, headers=TUS).status_code == 404
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_changed_bytes_are_460_and_the_offset_stays(client: TestClient, tmp_path: Path, algorithm: str) -> None:
    url = begin(client, 6)
    digest = base64.b64encode(hashlib.new(algorithm, b"abc").digest()).decode()
    answer = send(client, url, 0, b"abd", **{"Upload-Checksum": f"{algorithm} {digest}"})
    assert (answer.status_code, answer.json()["code"]) == (460, "checksum_mismatch")
    assert answer.headers["content-type"] == "application/problem+json"
    assert ask(client, url) == 0
    assert list_files(tmp_path) == []
    assert send(client, url, 0, b"abc", **{"Upload-Checksum": f"{algorithm} {digest}"}).status_code == 204
    assert ask(client, url) == 3


@pytest.mark.parametrize("checksum", ["md5 AAAA", "sha1", "sha1 xyz", "sha256 AAAA", "sha1 !!!!"])
def test_checksums_that_say_nothing_are_422(client: TestClient, checksum: str) -> None:
    answer = send(client, begin(client), 0, b"abc", **{"Upload-Checksum": checksum})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_checksum")


def test_wrong_digest_makes_nothing(client: TestClient) -> None:
    url = begin(client, 3)
    send(client, url, 0, b"abc")
    answer = complete(client, url, sha256="0" * 64)
    assert (answer.status_code, answer.json()["code"]) == (460, "checksum_mismatch")
    assert client.get("/v1/models").json()["items"] == []
    assert complete(client, url, sha256=hashlib.sha256(b"abc").hexdigest()).status_code == 201


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({}, 422, "/upload_id"),
        ({"upload_id": "upl_" + "a" * 26}, 422, "/sha256"),
        ({"upload_id": "../x", "sha256": "0" * 64}, 422, "/upload_id"),
        ({"upload_id": "upl_" + "a" * 26, "sha256": "0" * 64, "owner": "x"}, 422, "/owner"),
        ({"upload_id": "upl_" + "a" * 26, "sha256": "0" * 64}, 404, None),
        ([], 422, ""),
    ],
)
def test_completions_that_make_no_sense(client: TestClient, body: Any, status: int, pointer: str | None) -> None:
    answer = client.post("/v1/models", json=body)
    assert answer.status_code == status
    if pointer is not None:
        assert answer.json()["errors"][0]["pointer"] == pointer


def test_completion_that_is_no_json_is_400(client: TestClient) -> None:
    for body in (b"{", b"[" * 100_000, b"\xff"):
        answer = client.post("/v1/models", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")


def test_given_up_upload_frees_its_bytes(client: TestClient, tmp_path: Path) -> None:
    url = begin(client)
    send(client, url, 0, CONTENT[:1_000_000])
    assert len(list_files(tmp_path)) == 1
    assert client.delete(url, headers=TUS).status_code == 204
    assert list_files(tmp_path) == []
    assert client.delete(url, headers=TUS).status_code == 404


def test_expired_upload_is_gone_and_is_collected(
    client: TestClient, sqlite_database: Database, storage: Storage, tmp_path: Path
) -> None:
    url = begin(client, 6)
    send(client, url, 0, b"abc")
    with sqlite_database.session() as session:
        session.execute(update(UploadRow).values(expires_at=db_now(-1)))
    for answer in (client.get(url), send(client, url, 3, b"def"), complete(client, url)):
        assert (answer.status_code, answer.json()["code"]) == (410, "upload_expired")
    assert not collect(sqlite_database, storage, 0), "a row names its part"
    with sqlite_database.session() as session:
        assert forget_uploads(session) == 1
    assert collect(sqlite_database, storage, 0).num_blobs == 1
    assert list_files(tmp_path) == []
    assert client.get(url).status_code == 404


def test_limit_of_the_noun_is_looked_at_again_at_the_end(settings: Settings, tmp_path: Path) -> None:
    """It fits as a dataset; as a model it never does, and its bytes go."""
    with TestClient(create_app(settings.model_copy(update={"max_model_bytes": 2}))) as client:
        url = begin(client, 3)
        send(client, url, 0, b"abc")
        answer = complete(client, url, sha256=hashlib.sha256(b"abc").hexdigest())
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert client.get(url).status_code == 404
    assert list_files(tmp_path) == []


def test_uploads_of_others_are_not_there(client: TestClient, sqlite_database: Database) -> None:
    url = begin(client)
    with sqlite_database.session() as session:
        session.execute(update(UploadRow).values(owner="somebody else"))
    for answer in (client.get(url), send(client, url, 0, b"x"), client.delete(url, headers=TUS), complete(client, url)):
        assert answer.status_code == 404


@pytest.mark.parametrize("tenths", range(1, 10))
def test_cut_connection_keeps_what_arrived(live: httpx2.Client, tenths: int) -> None:
    url = begin(live)
    cut = len(CONTENT) * tenths // 10
    parts = urlsplit(str(live.base_url))
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as connection:
        head = (
            f"PATCH {url} HTTP/1.1\r\nHost: pare\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
            f"Content-Type: application/offset+octet-stream\r\nContent-Length: {len(CONTENT)}\r\n\r\n"
        )
        connection.sendall(head.encode() + CONTENT[:cut])
    wait_until(lambda: ask(live, url) > 0)
    offset = ask(live, url)
    assert offset <= cut
    assert send(live, url, offset, CONTENT[offset:]).status_code == 204
    assert complete(live, url).json()["sha256"] == SHA256


def test_two_appends_at_once_are_never_mixed(settings: Settings, database_url: str) -> None:
    """Two API processes' worth of applications; each append is another content, so mixing would show."""
    settings = settings.model_copy(update={"database_url": database_url})
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
        for number in range(8):
            url = begin(one, 300_000)
            bodies = [bytes([mark]) * 300_000 for mark in (1, 2)]
            answers: list[int] = []

            def append(client: TestClient, body: bytes, url: str = url, answers: list[int] = answers) -> None:
                answers.append(send(client, url, 0, body).status_code)

            threads = [threading.Thread(target=append, args=pair) for pair in zip((one, other), bodies, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(answers) == [204, 409], number
            digests = [hashlib.sha256(body).hexdigest() for body in bodies]
            made = [complete(other, url, sha256=digest).status_code for digest in digests]
            assert sorted(made) == [201, 460]


def test_long_append_is_safe_part_by_part(
    live: httpx2.Client, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "PART_BYTES", 1_000_000)
    url = begin(live)
    assert send(live, url, 0, CONTENT).status_code == 204
    assert len(list(upload_storage(storage, url.split("/")[-1]).blobs())) == 3
    assert complete(live, url).json()["sha256"] == SHA256
