"""Progress lines: throttled, merged over stages into one fraction that never falls, always valid JSON."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.recipes.plan import MAX_PROGRESS_LINE_BYTES, CheckpointFile, Progress
from worker.engine.progress import Reporter, Stage


class Recorder:
    """Collects lines; its clock goes where the test puts it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.raw: list[bytes] = []
        self.reporter = Reporter(self.raw.append, lambda: self.now)

    @property
    def lines(self) -> list[Progress]:
        return [Progress.model_validate_json(line) for line in self.raw]


def test_stages_share_the_fraction_by_weight() -> None:
    recorder = Recorder()
    recorder.reporter.start()
    recorder.reporter.expect([Stage("open_model", 1.0), Stage("finetune", 3.0, 0)])
    recorder.reporter.enter("open_model")
    recorder.reporter.enter("finetune")
    recorder.now = 10.0
    recorder.reporter.report(0.5, "half", loss=0.25)
    recorder.reporter.finish()
    assert [(line.stage, line.step, line.fraction) for line in recorder.lines] == [
        ("started", None, 0.0),
        ("open_model", None, 0.0),
        ("finetune", 0, 0.25),
        ("finetune", 0, 0.625),
        ("finished", None, 1.0),
    ]
    assert recorder.lines[3].metrics == {"loss": 0.25}
    assert recorder.lines[3].eta_seconds == pytest.approx(10, abs=0.1)


def test_a_long_stage_is_estimated_by_its_own_pace() -> None:
    recorder = Recorder()
    recorder.reporter.start()
    recorder.reporter.expect([Stage("open_model", 4.0), Stage("finetune", 8.0, 0), Stage("measure", 8.0)])
    recorder.reporter.enter("open_model")
    recorder.now = 4.0
    recorder.reporter.enter("finetune")
    recorder.now = 104.0
    recorder.reporter.report(0.01)
    assert recorder.lines[-1].eta_seconds == pytest.approx(100 * 99 + 8, rel=0.01)


def test_what_a_stage_prepares_is_not_taken_for_its_pace() -> None:
    recorder = Recorder()
    recorder.reporter.start()
    recorder.reporter.expect([Stage("finetune", 8.0, 0)])
    recorder.reporter.enter("finetune")
    recorder.now = 60.0  # processes start, quality is measured
    recorder.reporter.report(0.01)
    recorder.now = 61.0
    recorder.reporter.report(0.02)
    assert recorder.lines[-1].eta_seconds == pytest.approx(98, abs=1)


def test_the_first_words_of_a_stage_are_told_at_once() -> None:
    recorder = Recorder()
    recorder.reporter.expect([Stage("finetune", 8.0, 0)])
    recorder.reporter.enter("finetune")
    recorder.reporter.report(0.0, "starting 2 processes")
    recorder.reporter.report(0.0, "step 1")
    assert [line.message for line in recorder.lines] == ["", "starting 2 processes"]


def test_a_checkpoint_leaves_the_message_as_it_is() -> None:
    recorder = Recorder()
    recorder.reporter.expect([Stage("finetune", 8.0, 0)])
    recorder.reporter.enter("finetune")
    recorder.now = 1.0
    recorder.reporter.report(0.5, "step 4 of 8")
    recorder.reporter.announce(checkpoint=CheckpointFile(name="000001.checkpoint", size_bytes=1, sha256="0" * 64))
    assert [line.message for line in recorder.lines] == ["", "step 4 of 8", "step 4 of 8"]


def test_a_flood_of_reports_becomes_five_lines_a_second_and_keeps_the_last_numbers() -> None:
    recorder = Recorder()
    recorder.reporter.expect([Stage("finetune", 1.0, 0), Stage("export", 1.0)])
    recorder.reporter.enter("finetune")
    for index in range(1000):
        recorder.now = index / 1000
        recorder.reporter.report(index / 1000, loss=float(index))
    recorder.reporter.enter("export")
    assert len(recorder.raw) <= 1 + 5 + 2
    assert recorder.lines[-2].metrics == {"loss": 999.0}, "what was held back is told before the next stage"
    assert recorder.lines[-1].stage == "export"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50), st.floats(0.3, 100))
def test_the_fraction_never_falls_and_the_estimate_is_never_negative(fractions: list[float], pause: float) -> None:
    recorder = Recorder()
    recorder.reporter.expect([Stage("measure", 1.0), Stage("artifacts", 2.0)])
    recorder.reporter.enter("measure")
    for fraction in fractions:
        recorder.now += pause
        recorder.reporter.report(fraction)
    recorder.reporter.enter("artifacts")
    told = [line.fraction for line in recorder.lines]
    assert told == sorted(told)
    assert all(0 <= value <= 1 for value in told)
    assert all(line.eta_seconds is None or line.eta_seconds >= 0 for line in recorder.lines)


def test_odd_text_and_numbers_stay_one_valid_line() -> None:
    recorder = Recorder()
    recorder.reporter.expect([Stage("finetune", 1.0)])
    recorder.reporter.enter("finetune")
    recorder.now = 1.0
    many = {f"m{index}": "\u20ac" * 5000 for index in range(60)}
    recorder.reporter.report(0.1, "\n\ud800\x00" + "\u20ac" * 5000, loss=math.nan, **many)
    line = recorder.raw[-1]
    assert line.count(b"\n") == 1
    assert len(line) <= MAX_PROGRESS_LINE_BYTES
    assert json.loads(line)["metrics"]["loss"] is None


PRINTER = """
import ctypes, os, subprocess, sys
from worker.engine.progress import Reporter, take_stdout
write = take_stdout()
print('{"stage":"forged_by_print","fraction":1}', flush=True)
os.write(1, b'{"stage":"forged_by_fd","fraction":1}\\n')
libc = ctypes.CDLL(None)
libc.puts(b'{"stage":"forged_by_libc","fraction":1}')
libc.fflush(None)
subprocess.run([sys.executable, "-c", "print('forged by a child')"], check=True)
writer = "import os\\nfor fd in range(3, 64):\\n try: os.write(fd, b'forged')\\n except OSError: pass"
subprocess.run([sys.executable, "-c", writer], check=True)
Reporter(write).ready()
"""


def test_nothing_but_the_reporter_reaches_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTER], capture_output=True, check=True, timeout=60)
    assert done.stdout == b'{"stage": "ready", "step": null, "fraction": 0.0, "eta_seconds": null, ' + (
        b'"message": "", "metrics": {}, "checkpoint": null, "resumed": null}\n'
    )
    assert done.stderr.count(b"forged") == 4
