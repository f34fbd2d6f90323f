"""The watch over secrets in what tests say: it fails what tells one, by whichever way."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from app.access.tokens import new_token
from app.webhooks.endpoints import make_secret
from tests import canaries

ROOT = Path(__file__).resolve().parents[1]
LEAKS = {
    "stderr": "sys.stderr.write(secret)",
    "logging": "logging.getLogger('any').warning('with %s', secret)",
    "a log file": "(tmp_path / 'worker.log').write_text(secret)",
}


def run_pytest(tmp_path: Path, body: str) -> "subprocess.CompletedProcess[str]":
    test = tmp_path / "test_it.py"
    test.write_text(
        f"import logging, os, sys\ndef test_it(tmp_path):\n    secret = os.environ['PGPASSWORD']\n    {body}\n"
    )
    options = [
        "-p",
        "tests.canaries",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        f"--basetemp={tmp_path / 't'}",
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(test)],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("way", LEAKS)
def test_a_secret_that_is_told_fails_the_session(way: str, tmp_path: Path) -> None:
    done = run_pytest(tmp_path, LEAKS[way])
    assert done.returncode == 1, done.stdout
    assert "canary-of-the-databa..." in done.stdout


def test_what_tells_nothing_passes(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "(tmp_path / 'worker.log').write_text('nothing')")
    assert done.returncode == 0, done.stdout


def test_secrets_are_known_by_their_form() -> None:
    token = new_token("live", "key_" + "a" * 26).render()
    assert canaries.find(f"x {token} y".encode()) == [token[:20] + "..."]
    assert len(canaries.find(make_secret().encode())) == 1
    assert canaries.find(f"{token} {make_secret()}".encode(), planted_only=True) == []
    assert canaries.find(b"pare_live_ whsec_ canary") == []


def test_an_answer_that_tells_a_secret_fails_the_one_who_asked() -> None:
    answers = httpx2.MockTransport(lambda _: httpx2.Response(200, text=f"password={canaries.STORE}"))
    with httpx2.Client(transport=answers) as client, pytest.raises(AssertionError, match="tells a secret"):
        client.get("http://service/v1/keys")
