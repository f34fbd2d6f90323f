"""The engine's process is killed or asked to stop while it trains; another one ends the job with the same files."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.recipes.plan import Progress
from tests.engine.digits import Convolutions, Uploads, make_uploads
from tests.engine.process import Finished, plan_of, prepare, run, start
from worker.engine.checkpoints.stop import STOPPED

STEPS: list[dict[str, Any]] = [
    {"kind": "prune_structured", "ratio": 0.5, "round_to": 8},
    {"kind": "finetune", "epochs": 12, "batch_size": 256},  # long enough to be met while it runs
]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return make_uploads(Convolutions(), tmp_path_factory.mktemp("uploads"), epochs=1)


@pytest.fixture(scope="module")
def whole(uploads: Uploads, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tmp_path_factory.mktemp("whole") / "job", plan_of("optimize", **fields_of(uploads)), uploads.files)


def fields_of(uploads: Uploads) -> dict[str, Any]:
    return uploads.fields(STEPS, target={"num_runs": 10}, outputs={"formats": ["onnx", "pt2", "safetensors"]})


@contextmanager
def training(directory: Path, uploads: Uploads, checkpoint_seconds: float) -> Iterator[tuple[Any, Iterator[Progress]]]:
    """Give an engine's process and its progress lines as they come."""
    plan = plan_of("optimize", **fields_of(uploads), checkpoint_seconds=checkpoint_seconds)
    prepare(directory, plan, uploads.files)
    with (directory / "log").open("wb") as log, start(directory, log) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        try:
            yield process, (Progress.model_validate_json(line) for line in process.stdout)
        finally:
            process.kill()


def resume(directory: Path, uploads: Uploads, stopped: Path) -> Finished:
    checkpoints = sorted((stopped / "out" / "checkpoints").glob("*.checkpoint"), reverse=True)
    names = [path.name for path in checkpoints]
    plan = plan_of("optimize", **fields_of(uploads), checkpoint_seconds=3600, checkpoints=names)
    return run(directory, plan, uploads.files | {path.name: path for path in checkpoints})


def assert_same_models(resumed: Finished, whole: Finished) -> None:
    assert resumed.good.error is None
    assert [line.resumed is not None for line in resumed.lines].count(True) == 1, resumed.log
    assert {name: digest for name, digest in resumed.artifacts.items() if name.startswith("model.")} == {
        name: digest for name, digest in whole.artifacts.items() if name.startswith("model.")
    }


def test_a_killed_engine_is_taken_up_with_the_same_files(uploads: Uploads, whole: Finished, tmp_path: Path) -> None:
    with training(tmp_path / "killed", uploads, 0) as (process, lines):
        written = (line for line in lines if line.checkpoint is not None and line.stage == "finetune")
        for _ in range(7):
            next(written)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    assert_same_models(resume(tmp_path / "resumed", uploads, tmp_path / "killed"), whole)


def test_an_engine_that_is_asked_to_stop_writes_what_it_has(uploads: Uploads, whole: Finished, tmp_path: Path) -> None:
    with training(tmp_path / "stopped", uploads, 3600) as (process, lines):
        next(line for line in lines if line.stage == "finetune" and line.metrics)
        process.stdin.write(b"stop\n")
        process.stdin.flush()
        told = [line for line in lines if line.checkpoint is not None]
        status = process.wait()
    if status == 0:
        pytest.skip("the engine had done its work before it heard")

    assert status == STOPPED
    assert len(told) == 1
    assert_same_models(resume(tmp_path / "resumed", uploads, tmp_path / "stopped"), whole)


def test_an_engine_that_does_not_train_stops_at_once(uploads: Uploads, tmp_path: Path) -> None:
    with training(tmp_path / "stopped", uploads, 3600) as (process, lines):
        next(line for line in lines if line.stage == "open_model")
        process.stdin.write(b"stop\n")
        process.stdin.flush()

        assert process.wait() == STOPPED
    assert not (tmp_path / "stopped" / "out" / "result.json").exists()
