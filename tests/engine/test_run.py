"""The engine's process: warm start, progress, results, and every way to end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from app.recipes.plan import EngineResult, Progress
from tests.engine.process import digest, plan_of, prepare, run, start

DATASET = {"id": "dst_" + "a" * 26, "file": "data.npz", "format": "npz"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=np.zeros((5, 2, 3), np.float32), y=np.arange(5))
    return path


def wait_until_ready(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    assert Progress.model_validate_json(process.stdout.readline()).stage == "ready"


def test_a_dataset_is_checked_from_ready_to_result(tmp_path: Path, data: Path) -> None:
    plan = plan_of("check_dataset", datasets=[{**DATASET, "sha256": digest(data)}])
    finished = run(tmp_path / "job", plan, {"data.npz": data})
    facts = finished.good.dataset
    assert facts is not None
    assert facts.num_rows == 5
    assert [(column.name, column.dtype, column.shape) for column in facts.columns] == [
        ("x", "float32", (2, 3)),
        ("y", "int64", ()),
    ]
    assert [line.stage for line in finished.lines] == ["ready", "started", "check_dataset", "finished"]
    assert finished.lines[-1].fraction == 1.0
    assert sorted(path.name for path in (tmp_path / "job" / "out").iterdir()) == ["result.json"]


def test_a_bad_dataset_is_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK\x03\x04 nothing of the kind")
    plan = plan_of("check_dataset", datasets=[{**DATASET, "sha256": digest(path)}])
    finished = run(tmp_path / "job", plan, {"data.npz": path})
    assert finished.status == 0
    assert finished.result is not None
    assert finished.result.error is not None
    assert finished.result.error.code.startswith("dataset_")
    assert not finished.result.error.retryable
    assert finished.lines[-1].stage == "check_dataset"


def test_a_plan_that_is_none_is_an_error_of_the_worker(tmp_path: Path) -> None:
    finished = run(tmp_path / "job", b'{"action": "verify", "surprise": 1}')
    assert finished.status == 0
    assert finished.result is not None
    assert finished.result.error is not None
    assert finished.result.error.code == "bad_plan"


def test_a_crash_becomes_a_result_and_its_traceback_goes_to_the_log(tmp_path: Path) -> None:
    plan = plan_of("check_dataset", datasets=[{**DATASET, "sha256": "0" * 64}])
    finished = run(tmp_path / "job", plan)  # the file that the plan names is not there
    assert finished.status == 0
    assert finished.result is not None
    error = finished.result.error
    assert error is not None
    assert error.code == "engine_crash"
    assert "FileNotFoundError in stage 'check_dataset'" in error.detail
    assert "Traceback" not in error.detail
    assert "\n" not in error.detail
    assert "Traceback" in finished.log


def test_the_end_of_stdin_instead_of_go_ends_it_with_zero(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, start(tmp_path, log) as process:
        wait_until_ready(process)
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, b"")
    assert not (tmp_path / "out").exists()


def test_another_word_than_go_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, start(tmp_path, log) as process:
        wait_until_ready(process)
        process.communicate(b"gone\n", timeout=60)
    assert process.returncode == 2
    assert "expected the line 'go'" in (tmp_path / "log").read_text()


# Some 10 seconds in a single call: a handler in Python would have to wait for it.
BUSY = """
import torch
from worker.engine import run
run._end_on_signal()
torch.set_num_threads(1)
matrix = torch.ones(9000, 9000)
print("busy", flush=True)
matrix @ matrix
"""


def test_sigterm_ends_it_at_once_even_inside_one_long_operator() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        sent_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert time.monotonic() - sent_at < 1.0
    assert process.returncode == 128 + signal.SIGTERM


ALARM = """
import signal
from worker.engine import run
run._end_on_signal()
rang = []
signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
signal.setitimer(signal.ITIMER_REAL, 0.05)
while not rang:
    signal.pause()
import time
time.sleep(0.1)
print("alive")
"""


def test_a_signal_that_a_step_uses_does_not_end_it() -> None:
    done = subprocess.run([sys.executable, "-c", ALARM], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"alive\n"


def test_sigterm_ends_a_waiting_engine(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, start(tmp_path, log) as process:
        wait_until_ready(process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 128 + signal.SIGTERM


def test_what_takes_long_to_load_is_loaded_before_go(tmp_path: Path, data: Path) -> None:
    plan = plan_of("check_dataset", datasets=[{**DATASET, "sha256": digest(data)}])
    prepare(tmp_path / "job", plan, {"data.npz": data})
    with (tmp_path / "log").open("wb") as log, start(tmp_path / "job", log) as process:
        wait_until_ready(process)
        assert process.stdin is not None
        assert process.stdout is not None
        # How soon the first line follows is measured (docs/benchmarks/warm_start.md); here is what it rests on.
        assert "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert Progress.model_validate_json(process.stdout.readline()).stage == "started"
        process.communicate(timeout=60)
    result = EngineResult.model_validate_json((tmp_path / "job" / "out" / "result.json").read_bytes())
    assert result.dataset is not None
