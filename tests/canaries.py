"""Secrets are planted in the whole test session, and looked for in all that its processes say.

Planted: passwords and keys with known values, in the environment that every process of a test inherits, in the URL of
every PostgreSQL database and in the credentials of every S3 bucket of the tests. Keys of the API and secrets of
webhooks are random, and known by their form.

Looked at: what a test captured of stderr and logging, every answer that a client in the tests got, and when all tests
are over every log file that a process wrote. The engine of the fault tests looks into its own environment
(tests/worker/engines/scripted.py); tests/worker/test_secrets.py looks into the real one's from outside, and into rows
and files. This module is a plugin of pytest; tests/conftest.py registers it.
"""

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

MARK = "canary-of-"
STORE, DATABASE = f"{MARK}the-store-5d41402abc4b2a76", f"{MARK}the-database-900150983cd24fb0"
PLANTED = {"AWS_SECRET_ACCESS_KEY": STORE, "PGPASSWORD": DATABASE}
"""Variables of the environment of all tests."""
TOKEN = r"pare_[a-z0-9]{1,16}_[a-z0-9]{26}_[A-Za-z0-9]{32}_[0-9a-f]{8}"
WEBHOOK_SECRET = r"whsec_[A-Za-z0-9+/]{30,}"
_PLANTED = re.compile(MARK.encode() + rb"[a-z0-9-]+")
_ANY = re.compile(rb"|".join((_PLANTED.pattern, TOKEN.encode(), WEBHOOK_SECRET.encode())))
TELLING = re.compile(r"/v1/(keys|webhooks)(/[^/]+/rotate)?")
"""Where a secret is shown to the one it was made for, once."""
MAX_BYTES = 8 * 1024 * 1024
"""Of one answer or log file."""

_leaks = pytest.StashKey[list[str]]()


def find(text: bytes, *, planted_only: bool = False) -> list[str]:
    """Return the secrets in a text, cut short: a failure must not be the leak itself."""
    found = (_PLANTED if planted_only else _ANY).findall(text)
    return sorted({secret.decode()[:20] + "..." for secret in found})


def search_logs(folder: Path) -> Iterator[str]:
    """Yield a line for every log file below a folder that tells a secret."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name == "log" or ".log" in name or Path(parent).name == "logs":
                with (Path(parent) / name).open("rb") as file:
                    found = find(file.read(MAX_BYTES))
                if found:
                    yield f"{Path(parent) / name}: {', '.join(found)}"


def pytest_configure(config: pytest.Config) -> None:
    """Plant."""
    os.environ.update(PLANTED)
    config.stash[_leaks] = []
    _watch_answers()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test whose processes or loggers told a secret."""
    report = yield
    if call.when == "teardown" and report.passed:
        # On stdout a command may tell the one who asked for it.
        found = [
            f"{name}: {', '.join(secrets)}"
            for name, text in report.sections
            if (secrets := find(text.encode(errors="replace"), planted_only="stdout" in name))
        ]
        if found:
            report.outcome = "failed"
            report.longrepr = "a secret was told in " + "; ".join(found)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session where a log file tells a secret. The folders of all its processes are in the controller's."""
    config = session.config
    if hasattr(config, "workerinput"):
        return
    factory: pytest.TempPathFactory | None = getattr(config, "_tmp_path_factory", None)
    if factory is not None:
        config.stash[_leaks] = list(search_logs(factory.getbasetemp()))
    if config.stash[_leaks] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say where."""
    if config.stash[_leaks]:
        terminalreporter.section("secrets in logs")
        for line in config.stash[_leaks]:
            terminalreporter.write_line(line)


def _watch_answers() -> None:
    true_send = httpx2.Client.send
    if getattr(true_send, "watches", False):
        return

    def send(self: httpx2.Client, request: httpx2.Request, *, stream: bool = False, **named: Any) -> httpx2.Response:
        answer = true_send(self, request, stream=stream, **named)
        told = repr(answer.headers.raw).encode() + (b"" if stream else answer.content[:MAX_BYTES])
        found = find(told, planted_only=TELLING.fullmatch(request.url.path) is not None)
        assert not found, f"{request.method} {request.url.path} tells a secret: {', '.join(found)}"
        return answer

    send.watches = True  # type: ignore[attr-defined]
    httpx2.Client.send = send  # type: ignore[method-assign]
