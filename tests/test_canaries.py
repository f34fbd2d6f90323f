"""The watch over secrets in what tests say: it fails what tells one, by whichever way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from app.access.tokens import new_token
from app.webhooks.endpoints import make_secret
from tests import canaries

ROOT = Path(__file__).resolve().parents[1]
TOLD = """
import logging, os, sys
SECRET = os.environ["PGPASSWORD"]
def test_on_stderr(): sys.stderr.write(SECRET)
def test_to_a_logger(): logging.getLogger("any").warning("with %s", SECRET)
def test_nothing(): print("nothing")
"""
LOGGED = """
import os
def test_in_a_log_file(tmp_path): (tmp_path / "worker.log").write_text(os.environ["PGPASSWORD"])
"""


def run_pytest(tmp_path: Path, body: str) -> "subprocess.CompletedProcess[str]":
    test = tmp_path / "test_it.py"
    test.write_text(body)
    options = [
        "-p",
        "tests.canaries",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        f"--basetemp={tmp_path / 't'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", *options, str(test)],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "t", ignore_errors=True)  # or the watch over this session finds it, too
    return done


def test_a_test_that_tells_a_secret_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, TOLD)
    ends = re.findall(r"^(ERROR|PASSED|FAILED) \S+::(\w+)", done.stdout, flags=re.MULTILINE)
    assert {name for end, name in ends if end in ("ERROR", "FAILED")} == {"test_on_stderr", "test_to_a_logger"}
    assert done.returncode == 1, done.stdout
    assert "canary-of-the-databa..." in done.stdout


def test_a_log_file_that_tells_a_secret_fails_the_session(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, LOGGED)
    assert done.returncode == 1, done.stdout
    assert re.search(r"secrets in logs =+\n\S+worker\.log: canary-of-the-databa\.\.\.\n", done.stdout), done.stdout


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
