"""Health tells the truth: with real servers, each of which breaks in turn and comes back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from sqlalchemy import make_url

from app.settings import Settings
from benchmarks.upload_memory import find_free_port
from tests.postgres import PostgresServer
from tests.worker.conftest import Bench, Broker, Start, wait_until

SEEN_SECONDS = "3"


@pytest.fixture
def read(start: Start) -> Iterator[Callable[[], dict[str, Any]]]:
    """Read /health/ready of an API process whose dispatcher, worker and broker run; check that it lives, each time."""
    port = find_free_port()
    own = {"PARE_HEALTH_SEEN_SECONDS": SEEN_SECONDS}
    start("app", wait=False, PARE_PORT=str(port), **own)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:

        def answers() -> bool:
            try:
                return client.get("/health/live").status_code == 200
            except httpx2.TransportError:
                return False

        def look() -> dict[str, Any]:
            assert client.get("/health/live").json() == {"status": "ok"}
            answer = client.get("/health/ready")
            found: dict[str, Any] = answer.json()
            assert answer.status_code == (503 if found["status"] == "unavailable" else 200)
            return found

        wait_until(answers, what="the API")
        yield look


def broken(found: dict[str, Any]) -> list[str]:
    return sorted(name for name, check in found["checks"].items() if not check["ok"])


@contextmanager
def closed(server: PostgresServer, url: str) -> Iterator[None]:
    """Let nobody into a database, and throw out who is."""
    name = make_url(url).database
    server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    yield
    server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@pytest.mark.parametrize("bench", ["postgresql"], indirect=True)
def test_each_part_that_breaks_is_told_of_and_then_that_it_is_back(
    bench: Bench, broker: Broker, start: Start, read: Callable[[], dict[str, Any]], postgres_server: PostgresServer
) -> None:
    own = {"PARE_HEALTH_SEEN_SECONDS": SEEN_SECONDS}
    dispatcher = start("worker.dispatch", wait=False, **own)
    worker = start("worker", **own)

    def ready() -> bool:
        return bool(read()["status"] == "ready")

    wait_until(ready, what="everything")

    broker.child.stop(lambda: False)
    wait_until(lambda: broken(read()) == ["broker"], what="the word of the broker's end")
    assert read()["status"] == "degraded"
    broker.start()
    wait_until(ready, what="the word of its return")

    store = bench.settings.data_dir / "store"
    store.rename(store.with_name("away"))
    assert (read()["status"], broken(read())) == ("unavailable", ["storage"])
    store.with_name("away").rename(store)
    wait_until(ready, what="the return of the store")

    with closed(postgres_server, bench.settings.database_url):
        found = read()
        assert found["status"] == "unavailable"
        assert "database" in broken(found)
        assert found["checks"]["storage"]["ok"]
    wait_until(ready, what="the return of the database")

    assert dispatcher.process is not None
    dispatcher.process.kill()
    wait_until(lambda: broken(read()) == ["broker", "dispatcher"], what="the word of the dispatcher's end")
    assert read()["status"] == "degraded"
    start("worker.dispatch", wait=False, **own)
    wait_until(ready, what="the word of another's start")

    assert worker.process is not None
    worker.process.kill()
    wait_until(lambda: broken(read()) == ["workers"], what="the word of the worker's end")
    assert read()["status"] == "degraded"
    start("worker", **own)
    wait_until(ready, what="the word of another's start")


def test_by_default_an_end_is_told_of_within_ten_seconds() -> None:
    seconds = Settings().health_seen_seconds
    assert seconds + seconds / 4 <= 10  # not seen for so long, after a last sign of life that may be so old
