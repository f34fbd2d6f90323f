"""Downloads through a real nginx: the same answers, large files by its own sendfile, and the checks that stay."""

import hashlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

import app.storage.verified
from app.access.tokens import new_token
from app.api.throttle import MAX_BAD_KEYS
from app.db.session import Database
from app.main import create_app
from app.settings import Settings
from app.storage import Storage, open_storage, owner_storage
from pare.client import Client
from pare.records import Artifact as Announced
from tests.app.api.conftest import serve
from tests.app.api.keyed import bearer, create_keyed_app, make_token
from tests.app.api.test_downloads import (  # noqa: F401 - the same tests, of what comes through nginx
    BODY,
    SIZE,
    Artifact,
    add_artifact,
    test_artifacts_of_others_are_not_there,
    test_conditions,
    test_empty_file,
    test_one_range,
    test_other_ranges_are_ignored,
    test_range_on_a_socket,
    test_range_outside_is_416_with_the_size,
    test_whole_file,
)
from tests.app.api.test_resumable import CONTENT, SHA256, begin, complete, send
from tests.app.jobs.world import World
from tests.app.storage.test_verified import TICK_SECONDS
from tests.nginx import SENT_BY, needs_nginx, run_nginx

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def settings(directory: Path) -> Settings:
    return Settings(data_dir=directory, x_accel_redirect="/blobs/")


@pytest.fixture(scope="module")
def sqlite_database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database_url)
    database.upgrade()
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def world(sqlite_database: Database, settings: Settings) -> World:
    return World(sqlite_database, settings)


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return open_storage(settings.storage_url)


@pytest.fixture(scope="module")
def api_url(settings: Settings, sqlite_database: Database) -> Iterator[str]:  # noqa: ARG001 - it makes the tables
    with serve(create_app(settings)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def nginx_url(directory: Path, api_url: str) -> Iterator[str]:
    with run_nginx(directory / "nginx", api_url, directory / "store" / "blobs") as url:
        yield url


@pytest.fixture(scope="module")
def client(nginx_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=nginx_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def live(client: httpx2.Client) -> httpx2.Client:
    return client


@pytest.fixture
def direct(api_url: str) -> Iterator[httpx2.Client]:
    """Speaks to the API, past nginx."""
    with httpx2.Client(base_url=api_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def artifact(world: World, storage: Storage, sqlite_database: Database, client: httpx2.Client) -> Artifact:
    """A file that was verified: nginx sends it."""
    artifact = add_artifact(world, storage, BODY, sqlite_database)
    assert client.get(artifact.url).content == BODY
    return artifact


@pytest.fixture
def fresh(world: World, storage: Storage, sqlite_database: Database, request: pytest.FixtureRequest) -> Artifact:
    """A file of the test's own that nobody has read yet."""
    return add_artifact(world, storage, make_fresh(request.node.name), sqlite_database)


def make_fresh(name: str) -> bytes:
    return BODY[::-1] + name.encode()


def find_file(directory: Path, artifact: Artifact) -> Path:
    return directory / "store/blobs/owners/local" / artifact.sha256[:2] / artifact.sha256


def test_api_sends_what_nobody_has_verified_and_nginx_what_it_has(client: httpx2.Client, fresh: Artifact) -> None:
    answers = [client.get(fresh.url) for _ in range(3)]
    assert {hashlib.sha256(answer.content).hexdigest() for answer in answers} == {fresh.sha256}
    assert [SENT_BY in answer.headers for answer in answers] == [False, True, True]


def test_ranges_are_verified_by_nobody_so_nginx_sends_them_at_once(client: httpx2.Client, fresh: Artifact) -> None:
    part = client.get(fresh.url, headers={"Range": "bytes=1-", "If-Range": fresh.etag})
    assert (part.status_code, SENT_BY in part.headers) == (206, True)
    assert SENT_BY not in client.get(fresh.url).headers


def test_small_answers_are_the_apis(client: httpx2.Client, artifact: Artifact) -> None:
    assert SENT_BY not in client.get(artifact.url, headers={"Range": "bytes=0-1048575"}).headers
    assert SENT_BY in client.get(artifact.url, headers={"Range": "bytes=0-1048576"}).headers


@pytest.mark.parametrize("value", ["", "bytes=1-", f"bytes=-{SIZE - 1}"])
def test_answers_of_nginx_and_of_the_api_are_alike(
    client: httpx2.Client, direct: httpx2.Client, artifact: Artifact, value: str
) -> None:
    headers = {"X-Request-ID": "the-same-one", **({"Range": value, "If-Range": artifact.etag} if value else {})}
    theirs, ours = client.get(artifact.url, headers=headers), direct.get(artifact.url, headers=headers)
    assert (SENT_BY in theirs.headers, SENT_BY in ours.headers) == (True, False)
    assert (theirs.status_code, theirs.content) == (ours.status_code, ours.content)

    def list_headers(answer: httpx2.Response) -> list[tuple[str, str]]:
        own = {"date", "server", "connection", SENT_BY.lower()}
        found = [(k, "varies" if k == "ratelimit" else v) for k, v in answer.headers.multi_items() if k not in own]
        return sorted(found)

    assert list_headers(theirs) == list_headers(ours)
    assert list_headers(client.head(artifact.url, headers=headers)) == list_headers(ours)


@pytest.mark.parametrize(
    "headers",
    [
        {"If-Match": "ETAG"},
        {"If-Modified-Since": "Fri, 31 Dec 9999 23:59:59 GMT"},
        {"If-Unmodified-Since": "Wed, 21 Oct 2015 07:28:00 GMT"},
        {"If-Range": '"x"', "Range": "bytes=1-"},
        {"Range": "bytes=0-1,5-"},
        {"Range": "bytes=5-2"},
    ],
)
def test_what_nginx_would_answer_otherwise_the_api_answers(
    client: httpx2.Client, artifact: Artifact, headers: dict[str, str]
) -> None:
    answer = client.get(artifact.url, headers={k: v.replace("ETAG", artifact.etag) for k, v in headers.items()})
    assert (answer.status_code, answer.content, SENT_BY in answer.headers) == (200, BODY, False)


def test_validators_that_nginx_makes_by_itself_mean_nothing(
    client: httpx2.Client, artifact: Artifact, directory: Path
) -> None:
    modified = int(find_file(directory, artifact).stat().st_mtime)
    answer = client.get(artifact.url, headers={"If-None-Match": f'"{modified:x}-{SIZE:x}"'})
    assert (answer.status_code, answer.content, SENT_BY in answer.headers) == (200, BODY, True)


def test_a_file_that_was_touched_is_verified_again_and_put_aside(
    client: httpx2.Client, fresh: Artifact, directory: Path
) -> None:
    body = client.get(fresh.url).content
    time.sleep(TICK_SECONDS)
    find_file(directory, fresh).write_bytes(bytes([body[0] ^ 1]) + body[1:])
    with pytest.raises(httpx2.RemoteProtocolError):
        client.get(fresh.url)
    answer = client.get(fresh.url)
    assert (answer.status_code, answer.json()["code"]) == (503, "integrity")


def test_a_file_of_another_size_is_not_handed_over(client: httpx2.Client, fresh: Artifact, directory: Path) -> None:
    with find_file(directory, fresh).open("ab") as file:
        file.write(b"more")
    part = client.get(fresh.url, headers={"Range": "bytes=1-"})
    assert (part.status_code, SENT_BY in part.headers) == (206, False)


def test_lost_bytes_are_503_after_they_were_verified(client: httpx2.Client, fresh: Artifact, storage: Storage) -> None:
    assert client.get(fresh.url).status_code == 200
    owner_storage(storage, "local").delete(fresh.sha256)
    for headers in ({}, {"Range": "bytes=1-"}):
        answer = client.get(fresh.url, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (503, "blob_missing")


def test_a_check_is_good_for_a_while(
    client: httpx2.Client, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.storage.verified, "KEEP_SECONDS", 0.0)
    answer = client.get(artifact.url)
    assert (answer.content, SENT_BY in answer.headers) == (BODY, False)


def test_nobody_gets_at_the_files_from_outside(client: httpx2.Client, artifact: Artifact, directory: Path) -> None:
    path = find_file(directory, artifact).relative_to(directory / "store")
    claims = {"X-Accel-Redirect": f"/{path}", "X-Sendfile-Type": "X-Accel-Redirect", "X-Accel-Mapping": "/=/"}
    for url in (f"/{path}", f"/v1/../{path}", f"//{path}", "/blobs/", "/blobs/../pare.sqlite3"):
        answer = client.get(url, headers=claims)
        assert (answer.status_code, SENT_BY in answer.headers) == (404, False)


@pytest.mark.parametrize("claim", [{}, {"X-Sendfile-Type": "X-Sendfile"}])
def test_who_comes_past_the_proxy_gets_the_bytes(
    direct: httpx2.Client, artifact: Artifact, claim: dict[str, str]
) -> None:
    answer = direct.get(artifact.url, headers=claim)
    assert (answer.content, "x-accel-redirect" in answer.headers) == (BODY, False)


def test_who_claims_to_be_the_proxy_learns_nothing_but_the_name_of_its_own_file(
    direct: httpx2.Client,
    artifact: Artifact,
    world: World,
    storage: Storage,
    sqlite_database: Database,
    directory: Path,
) -> None:
    claim = {"X-Sendfile-Type": "X-Accel-Redirect", "X-Accel-Mapping": "/blobs/=/etc/"}
    answer = direct.get(artifact.url, headers=claim)
    name = f"/blobs/owners/local/{artifact.sha256[:2]}/{artifact.sha256}"
    assert (answer.content, answer.headers["x-accel-redirect"]) == (b"", name)
    assert str(directory) not in str(answer.headers)
    theirs = add_artifact(world, storage, BODY, sqlite_database, owner="somebody else")
    answer = direct.get(theirs.url, headers=claim)
    assert (answer.status_code, "x-accel-redirect" in answer.headers) == (404, False)


def test_keys_are_asked_for_and_clients_counted_by_the_address_that_nginx_sees(
    settings: Settings, sqlite_database: Database, artifact: Artifact, tmp_path: Path
) -> None:
    good, theirs = make_token(sqlite_database, "local"), make_token(sqlite_database, "ann")
    blobs = settings.data_dir / "store" / "blobs"
    with (
        serve(create_keyed_app(settings)) as (api_url, _),
        run_nginx(tmp_path / "nginx", api_url, blobs) as url,
        httpx2.Client(base_url=url, trust_env=False) as client,
    ):
        answers = [client.get(artifact.url, headers=bearer(good)) for _ in range(2)]
        assert [SENT_BY in answer.headers for answer in answers] == [False, True]
        assert client.get(artifact.url, headers=bearer(theirs)).status_code == 404
        statuses = []
        for number in range(MAX_BAD_KEYS):
            forged = new_token("live", f"key_{number:026d}").render()
            claimed = {**bearer(forged), "X-Forwarded-For": f"192.0.2.{number}"}
            statuses.append(client.get(artifact.url, headers=claimed).status_code)
    assert statuses == [401] * (MAX_BAD_KEYS - 1) + [429]


def test_files_that_nginx_cannot_read_come_from_the_api(api_url: str, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with run_nginx(tmp_path / "nginx", api_url, tmp_path / "empty") as url:
        whole = httpx2.get(f"{url}{artifact.url}", trust_env=False)
        part = httpx2.get(f"{url}{artifact.url}", headers={"Range": "bytes=1-"}, trust_env=False)
    assert (whole.status_code, whole.content) == (200, BODY)
    assert (part.status_code, part.content) == (206, BODY[1:])
    assert whole.headers["repr-digest"] == part.headers["repr-digest"]


def test_over_tls(api_url: str, artifact: Artifact, directory: Path, tmp_path: Path) -> None:
    with run_nginx(tmp_path / "nginx", api_url, directory / "store" / "blobs", tls=True) as url:
        trusted = ssl.create_default_context(cafile=tmp_path / "nginx" / "pare.pem")
        with httpx2.Client(base_url=url, verify=trusted, trust_env=False) as client:
            answer = client.get(artifact.url)
            assert (answer.content, SENT_BY in answer.headers) == (BODY, True)
            location = begin(client)
            assert send(client, location, 0, CONTENT).status_code == 204
            assert complete(client, location).json()["sha256"] == SHA256


def test_client_goes_on_where_it_stopped(nginx_url: str, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / f".model.onnx.{artifact.sha256[:16]}.partial").write_bytes(BODY[:1000])
    media_type = "application/octet-stream"
    announced = Announced(artifact.id, "model.onnx", media_type, SIZE, artifact.sha256, created_at="")
    seen: list[int] = []
    with Client(nginx_url) as client:
        path = client.artifacts.download(announced, tmp_path, on_bytes=lambda done, _: seen.append(done))
    assert path.read_bytes() == BODY
    assert 1000 < seen[0] <= seen[-1] == SIZE


def test_uploads_get_through(client: httpx2.Client) -> None:
    """More than the megabyte that nginx allows by itself."""
    answer = client.post("/v1/models", content=BODY)
    assert (answer.status_code, answer.json()["sha256"]) == (201, hashlib.sha256(BODY).hexdigest())
    url = begin(client)
    assert send(client, url, 0, CONTENT[:1_500_000]).status_code == 204
    assert send(client, url, 1_500_000, CONTENT[1_500_000:]).status_code == 204
    assert complete(client, url).json()["sha256"] == SHA256


def test_events_come_as_they_happen(client: httpx2.Client, world: World) -> None:
    with client.stream("GET", f"/v1/jobs/{world.submit()}/events", headers={"Accept": "text/event-stream"}) as stream:
        assert next(stream.iter_lines())  # the job waits: the stream goes on
