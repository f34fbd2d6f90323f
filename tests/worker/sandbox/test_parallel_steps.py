"""A parallel step in the real engine inside the real sandbox: its ranks find each other, and none is left behind."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.recipes.plan import EngineResult
from tests.engine.digits import Convolutions, Uploads, make_uploads
from tests.engine.process import plan_of
from tests.worker.conftest import find_descendants, wait_until
from worker.sandbox.detect import detect
from worker.sandbox.isolation import Limits
from worker.sandbox.launch import SandboxProcess, remove_directory, start

LIMITS = Limits(memory_bytes=16 * 2**30, file_bytes=2**30)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return make_uploads(Convolutions(), tmp_path_factory.mktemp("digits"), epochs=0)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "job"
    remove_directory(tmp_path / "job")


def test_two_ranks_train_in_the_sandbox_and_a_killed_one_ends_the_step(job: Path, uploads: Uploads) -> None:
    isolation = detect("auto")
    if not isolation.isolates:
        pytest.skip(f"nothing isolates on this machine: {isolation.problems}")
    step = {"kind": "finetune", "epochs": 500, "parallel": {"data": 2}}
    plan = plan_of("optimize", num_threads=2, **uploads.fields([step]))
    command = [sys.executable, "-m", "worker.engine.run", "{job}"]
    sandbox = start(isolation, job, command, LIMITS, num_threads=2, loopback=True)
    assert sandbox.process.stdin is not None
    for name, path in uploads.files.items():
        (job / "in" / name).write_bytes(path.read_bytes())
        (job / "in" / name).chmod(0o644)
    (job / "in" / "plan.json").write_text(plan.model_dump_json())
    lines: list[dict[str, Any]] = []
    reader = threading.Thread(target=_read_lines, args=(sandbox, lines), daemon=True)
    errors = threading.Thread(target=_drain, args=(sandbox,), daemon=True)
    reader.start()
    errors.start()

    sandbox.process.stdin.write(b"go\n")
    sandbox.process.stdin.close()
    wait_until(lambda: _has_trained(lines) or sandbox.exit_status() is not None, 280, "the second step")
    assert _has_trained(lines), (job / "out" / "result.json").read_text()
    ranks = find_descendants(sandbox.pid, "worker.engine.parallel.rank")
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)

    assert sandbox.process.wait(60) == 0
    result = EngineResult.model_validate_json((job / "out" / "result.json").read_bytes())
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("rank_lost", True)
    assert find_descendants(sandbox.pid, "") == []
    sandbox.kill(isolation.isolates)
    for thread in (reader, errors):
        thread.join(10)


def _has_trained(lines: list[dict[str, Any]]) -> bool:
    return any(line["metrics"].get("step", 0) >= 2 for line in lines)


def _read_lines(sandbox: SandboxProcess, lines: list[dict[str, Any]]) -> None:
    assert sandbox.process.stdout is not None
    rest = b""
    while data := os.read(sandbox.process.stdout.fileno(), 65536):
        *whole, rest = (rest + data).split(b"\n")
        lines.extend(json.loads(line) for line in whole)
    sandbox.process.stdout.close()


def _drain(sandbox: SandboxProcess) -> None:
    assert sandbox.process.stderr is not None
    while data := os.read(sandbox.process.stderr.fileno(), 65536):
        sys.stderr.write(data.decode(errors="replace"))
    sandbox.process.stderr.close()
