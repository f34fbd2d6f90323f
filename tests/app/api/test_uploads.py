"""Uploads: streamed, hashed, limited, and gone without a trace when they fail."""

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.testclient import TestClient

from app.errors import StorageFull
from app.storage.local import LocalBlobWriter
from tests.app.api.conftest import LIMIT_BYTES, wait_until
from tests.app.jobs.world import World


def list_files(tmp_path: Path) -> list[str]:
    """Return what storage holds: incoming and complete."""
    return sorted(path.name for path in (tmp_path / "store").rglob("*") if path.is_file())


@pytest.mark.parametrize("noun", ["models", "datasets"])
def test_upload_is_stored_hashed_and_queued_for_its_check(
    both: tuple[TestClient, World], tmp_path: Path, noun: str
) -> None:
    client, world = both
    body = bytes(range(256)) * 10_000  # two chunks and a bit
    format = {"models": "pt2", "datasets": "npz"}[noun]
    answer = client.post(f"/v1/{noun}", params={"name": "first", "format": format}, content=body)
    assert answer.status_code == 201
    upload = answer.json()
    assert upload["sha256"] == hashlib.sha256(body).hexdigest()
    assert (upload["size_bytes"], upload["state"], upload["name"]) == (len(body), "checking", "first")
    assert upload["facts"] is None
    assert upload["error"] is None
    assert answer.headers["location"] == upload["links"]["self"] == f"/v1/{noun}/{upload['id']}"
    assert client.get(upload["links"]["self"]).json() == upload
    assert list_files(tmp_path) == [upload["sha256"]]
    (check_id,) = world.outbox()
    assert world.job(check_id).action == f"check_{noun[:-1]}"
    assert client.get("/v1/jobs").json()["items"] == []  # checks are not shown as jobs
    assert client.get(f"/v1/jobs/{check_id}").status_code == 404


@pytest.mark.parametrize("format", ["npz", "safetensors", "parquet", "images"])
def test_every_format_of_datasets_is_taken(client: TestClient, format: str) -> None:
    answer = client.post("/v1/datasets", params={"format": format}, content=b"PAR1")
    assert answer.status_code == 201
    assert answer.json()["format"] == format


def test_other_formats_of_datasets_are_refused(client: TestClient) -> None:
    answer = client.post("/v1/datasets", params={"format": "csv"}, content=b"a,b")
    assert answer.status_code == 422
    assert "parquet" in answer.text


def test_too_large_by_its_own_word_is_refused_unread(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/v1/models", content=b"", headers={"Content-Length": str(LIMIT_BYTES + 1)})
    assert answer.status_code == 413
    assert answer.json()["code"] == "too_large"
    assert str(LIMIT_BYTES) in answer.json()["detail"]
    assert list_files(tmp_path) == []


def test_too_large_by_stealth_is_cut_off(live: httpx2.Client, tmp_path: Path) -> None:
    """Chunked encoding declares no length; the limit is met on the way."""
    sent = 0

    def lie() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1024 * 1024
            yield bytes(1024 * 1024)

    answer = live.post("/v1/models", content=lie())
    assert answer.status_code == 413
    assert answer.json()["code"] == "too_large"
    assert sent < 64 * 1024 * 1024
    wait_until(lambda: list_files(tmp_path) == [])
    assert live.get("/v1/models").json()["items"] == []


def test_exactly_the_limit_is_taken(client: TestClient) -> None:
    assert client.post("/v1/models", content=bytes(LIMIT_BYTES)).status_code == 201


def test_empty_upload_is_refused(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/v1/models", content=b"")
    assert (answer.status_code, answer.json()["code"]) == (422, "empty_upload")
    assert list_files(tmp_path) == []


def test_form_is_refused_with_the_way_to_do_it(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/v1/models", files={"file": b"abc"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_format")
    assert "--data-binary" in answer.json()["fix"]
    assert list_files(tmp_path) == []


def test_compressed_body_is_refused(client: TestClient) -> None:
    for path in ("/v1/models", "/v1/jobs"):
        answer = client.post(path, content=b"abc", headers={"Content-Encoding": "gzip"})
        assert (answer.status_code, answer.headers["content-type"]) == (415, "application/problem+json")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_client_that_goes_away_leaves_nothing(live: httpx2.Client, tmp_path: Path, fraction: float) -> None:
    url = urlsplit(str(live.base_url))
    size = 2 * 1024 * 1024
    with socket.create_connection((url.hostname or "", url.port or 0)) as connection:
        head = f"POST /v1/models HTTP/1.1\r\nHost: pare\r\nContent-Length: {size}\r\n\r\n".encode()
        connection.sendall(head + bytes(int(size * fraction)))
        wait_until(lambda: len(list_files(tmp_path)) == 1)
    wait_until(lambda: list_files(tmp_path) == [])
    assert live.get("/v1/models").json()["items"] == []


def test_full_storage_is_507_and_leaves_nothing(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel's ENOSPC cannot be had without mounting; this is what the storage raises for it.
    def refuse(_writer: LocalBlobWriter, _data: bytes) -> None:
        raise StorageFull

    monkeypatch.setattr(LocalBlobWriter, "write", refuse)
    answer = client.post("/v1/models", content=b"abc")
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert answer.json()["retryable"] is True
    assert int(answer.headers["retry-after"]) > 0
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a" * 201, "a\0b", "a\r\nX: y", "\u202egpj.exe", "\x7f", "\ud800"])
def test_names_that_disguise_are_refused(client: TestClient, name: str) -> None:
    quoted = "".join(f"%{byte:02x}" for byte in name.encode("utf-8", "surrogatepass"))
    answer = client.post(f"/v1/models?name={quoted}", content=b"abc")
    if name == "\ud800":  # arrives as replacement characters, which are harmless
        assert answer.status_code == 201
    else:
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "query:name"


@pytest.mark.parametrize("name", ["../../etc/passwd", "modell-\u00e4\u00f6", "a b; c='d'", '"x"'])
def test_other_names_are_only_names(client: TestClient, tmp_path: Path, name: str) -> None:
    answer = client.post("/v1/models", params={"name": name}, content=b"abc")
    assert answer.json()["name"] == name
    assert list_files(tmp_path) == [hashlib.sha256(b"abc").hexdigest()]


@pytest.mark.parametrize(("noun", "format"), [("models", "pkl"), ("datasets", "csv"), ("datasets", None)])
def test_unknown_format_is_refused(client: TestClient, noun: str, format: str | None) -> None:
    answer = client.post(f"/v1/{noun}", params={"format": format} if format else {}, content=b"abc")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "query:format"


def test_unused_upload_can_be_deleted(both: tuple[TestClient, World]) -> None:
    client, world = both
    for noun, upload_id in (("models", world.add_model()), ("datasets", world.add_dataset())):
        assert client.delete(f"/v1/{noun}/{upload_id}").status_code == 204
        assert client.get(f"/v1/{noun}/{upload_id}").status_code == 404
        assert client.delete(f"/v1/{noun}/{upload_id}").status_code == 404


def test_upload_in_use_cannot_be_deleted(both: tuple[TestClient, World]) -> None:
    client, world = both
    job_id = world.submit()
    answer = client.delete(f"/v1/models/{world.model_id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "model_in_use")
    assert job_id in answer.json()["detail"]
    world.cancel(job_id)
    assert client.delete(f"/v1/models/{world.model_id}").status_code == 204
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["model_id"], job["links"]["model"]) == ("cancelled", None, None)


def test_upload_being_checked_cannot_be_deleted(client: TestClient) -> None:
    upload = client.post("/v1/datasets", params={"format": "npz"}, content=b"abc").json()
    answer = client.delete(f"/v1/datasets/{upload['id']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_in_use")


def test_uploads_of_others_are_not_there(both: tuple[TestClient, World]) -> None:
    client, world = both
    theirs = world.add_model(owner="somebody else")
    assert client.get(f"/v1/models/{theirs}").status_code == 404
    assert client.delete(f"/v1/models/{theirs}").status_code == 404
    assert theirs not in client.get("/v1/models").text
