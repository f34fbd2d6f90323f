"""The composed service behind nginx: large files leave its container and not the API's."""

import os
import secrets
from collections.abc import Iterator

import httpx2
import pytest

from tests.docker.composed import START_SECONDS, Images, Stack, find_free_port, run_stack, wait_for

pytestmark = pytest.mark.docker

CONTENT = secrets.token_bytes(8_000_000)
ARTIFACT = "art_" + "0" * 26
# A file that a job left: the upload itself, and the job that checks it.
INSERT = f"""
import os, sqlalchemy
with sqlalchemy.create_engine(os.environ["PARE_DATABASE_URL"]).begin() as connection:
    connection.execute(sqlalchemy.text('''
        INSERT INTO artifacts (id, job_id, owner, name, media_type, size_bytes, sha256, epoch, created_at)
        SELECT '{ARTIFACT}', jobs.id, models.owner, 'model.pt2', 'application/octet-stream',
               models.size_bytes, models.sha256, 1, now()
        FROM models JOIN jobs ON jobs.model_id = models.id'''))
"""
COUNT = """
from pathlib import Path
print(sum(int(path.read_text()) for path in Path("/sys/class/net").glob("eth*/statistics/tx_bytes")))
"""


@pytest.fixture(scope="module")
def port() -> int:
    return find_free_port()


@pytest.fixture(scope="module")
def stack(images: Images, port: int) -> Iterator[Stack]:
    files = f"{os.environ.get('COMPOSE_FILE', 'docker-compose.yml')}:docker/compose.nginx.yml"
    with run_stack(images, "nginx", COMPOSE_FILE=files, PARE_NGINX_PUBLISH=f"127.0.0.1:{port}") as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack, port: int) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

        def look() -> bool | None:
            try:
                return client.get("/health/live").status_code == 200 or None
            except httpx2.TransportError:
                return None

        wait_for("nginx and the API answer", START_SECONDS, look)
        (api,) = stack.containers("api")
        command = ("python", "-m", "app.access", "create", "--owner", "tester", "--scopes", "read,write")
        client.headers["Authorization"] = f"Bearer {stack.execute(api, *command).strip()}"
        yield client


def run_in_api(stack: Stack, code: str) -> str:
    (api,) = stack.containers("api")
    return stack.execute(api, "python", "-c", code)


def test_large_files_do_not_pass_through_the_api(stack: Stack, client: httpx2.Client) -> None:
    assert client.post("/v1/models", content=CONTENT).status_code == 201
    run_in_api(stack, INSERT)
    before = int(run_in_api(stack, COUNT))
    assert client.get(f"/v1/artifacts/{ARTIFACT}").content == CONTENT
    verified = int(run_in_api(stack, COUNT))
    assert verified - before > len(CONTENT)
    assert client.get(f"/v1/artifacts/{ARTIFACT}").content == CONTENT
    assert int(run_in_api(stack, COUNT)) - verified < 1_000_000


def test_nginx_is_hardened(stack: Stack, client: httpx2.Client) -> None:
    assert client.get("/blobs/").status_code == 404
    (nginx,) = stack.containers("nginx")
    facts = stack.inspect(nginx)
    assert facts["HostConfig"]["ReadonlyRootfs"]
    assert facts["HostConfig"]["CapDrop"] == ["ALL"]
    assert facts["Config"]["User"] == "10001:10001"
    assert {mount["Destination"]: mount["RW"] for mount in facts["Mounts"] if mount["Type"] == "volume"} == {
        "/var/lib/pare/store": False
    }
    assert not any("inside" in name for name in facts["NetworkSettings"]["Networks"]), "no way to the database"
