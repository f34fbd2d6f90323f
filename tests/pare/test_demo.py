"""`pare demo` for real: it ends with a smaller, faster, right model, and leaves no process, however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pare.processes import descendants

COMMAND = [sys.executable, "-m", "pare", "demo", "--data-dir"]


@pytest.fixture
def environment() -> dict[str, str]:
    """A user's own settings, which must not reach the demonstration's service."""
    return {**os.environ, "PARE_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none", "PARE_URL": "http://x"}


def _left_behind(directory: Path) -> list[str]:
    """Return the commands of all processes that have to do with this directory, wherever they hang."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in told and int(entry.name) != os.getpid():
            found.append(f"{entry.name}: {told[:200]!r}")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_demo_makes_a_smaller_faster_model_that_predicts_without_pare(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run([*COMMAND, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert "Faster" in out
    assert re.search(r"file is \d\d% smaller", out)
    right = re.search(r"(\d+) of 450 held-out digits right \((0\.\d+)\), counted without Pare", out)
    assert right is not None
    # What the service measured is what a program without Pare counts.
    row = next(line for line in out.splitlines() if "accuracy, 450 held-out examples" in line)
    assert row.split("+-")[1].split()[1] == right.group(2)
    assert float(right.group(2)) > 0.95
    memory = re.search(r"at most ([\d.]+) MiB of memory", out)
    assert memory is not None
    assert 20 < float(memory.group(1)) < 120
    assert {"model.onnx", "manifest.json", "load.py"} <= {path.name for path in (tmp_path / "artifacts").iterdir()}
    assert _left_behind(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("marker", "number", "code"),
    [
        (None, signal.SIGINT, 130),  # before it has said anything: while the service starts
        pytest.param("[2/5]", signal.SIGTERM, 143, marks=pytest.mark.long),  # while it trains
        pytest.param("job: running", signal.SIGINT, 130, marks=pytest.mark.faults),  # while the engine runs
    ],
)
def test_a_signal_at_any_moment_leaves_no_process(
    tmp_path: Path, environment: dict[str, str], marker: str | None, number: signal.Signals, code: int
) -> None:
    log = tmp_path / "out"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*COMMAND, str(tmp_path / "demo")], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    deadline = time.monotonic() + 200
    while not (marker in log.read_text() if marker else len(descendants(process.pid)) > 2):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)

    assert process.wait(60) == code, log.read_text()
    assert _left_behind(tmp_path) == []
    assert "stopped; no process is left" in log.read_text()
    assert "Traceback" not in log.read_text()
