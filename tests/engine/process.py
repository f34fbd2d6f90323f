"""Running the real engine process on a directory, as a worker would, without a sandbox around it."""

import functools
import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from app.recipes.plan import EngineResult, Plan, Progress

TIMEOUT_SECONDS = 240
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
DRIVER_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Finished:
    """What an engine process left behind."""

    status: int
    lines: list[Progress]
    result: EngineResult | None
    log: str
    directory: Path

    @property
    def good(self) -> EngineResult:
        """The result, which must not be an error."""
        assert self.result is not None, self.log
        assert self.result.error is None, f"{self.result.error}\n{self.log}"
        assert self.status == 0
        return self.result

    @property
    def artifacts(self) -> dict[str, str]:
        """Artifact name -> sha256, as found on disk."""
        paths = sorted((self.directory / "out" / "artifacts").iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def prepare(directory: Path, plan: Plan | bytes, files: dict[str, Path] | None = None) -> Path:
    """Lay out DIR/in."""
    (directory / "in").mkdir(parents=True)
    content = plan if isinstance(plan, bytes) else plan.model_dump_json().encode()
    (directory / "in" / "plan.json").write_bytes(content)
    for name, path in (files or {}).items():
        shutil.copyfile(path, directory / "in" / name)
    return directory


def start(directory: Path, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start an engine on DIR, warm but not going."""
    return subprocess.Popen(
        [sys.executable, "-m", "worker.engine.run", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={"PATH": os.environ["PATH"], **ENVIRONMENT},
        cwd=Path(__file__).parents[2],
    )


def run(directory: Path, plan: Plan | bytes, files: dict[str, Path] | None = None) -> Finished:
    """Run one plan to its end in a process of its own."""
    prepare(directory, plan, files)
    status = _run_fresh(directory) if _sees_gpu() else _run_forked(directory)
    path, log_path = directory / "out" / "result.json", directory / "log"
    return Finished(
        status=status,
        lines=[Progress.model_validate_json(line) for line in (directory / "stdout").read_bytes().splitlines()],
        result=EngineResult.model_validate_json(path.read_bytes()) if path.exists() else None,
        log=log_path.read_text(encoding="utf-8", errors="replace"),
        directory=directory,
    )


def _sees_gpu() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(path.exists() for path in DRIVER_NODES)


def _run_fresh(directory: Path) -> int:
    """Run what `_run_forked` runs where it cannot: warming up asks the driver for GPUs, and what is forked from a
    process that has asked sees none."""
    with (directory / "stdout").open("wb") as stdout, (directory / "log").open("wb") as log:
        return subprocess.run(
            [sys.executable, "-m", "worker.engine.run", str(directory)],
            input=b"go\n",
            stdout=stdout,
            stderr=log,
            env={**os.environ, **ENVIRONMENT},
            cwd=Path(__file__).parents[2],
            timeout=TIMEOUT_SECONDS,
            check=False,
        ).returncode


def _run_forked(directory: Path) -> int:
    """Fork it from a process that is warm already: seconds less a run."""
    process = _fork_server().Process(target=_become_engine, args=(directory,))
    process.start()
    process.join(TIMEOUT_SECONDS)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@functools.cache
def _fork_server() -> "multiprocessing.context.ForkServerContext":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.warm"])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _become_engine(directory: Path) -> None:
    """Do in this process what `python -m worker.engine.run DIRECTORY` does, with the word to go given."""
    from worker.engine.run import main

    (directory / "stdin").write_bytes(b"go\n")
    for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", _NEW), ("log", _NEW))):
        os.dup2(os.open(directory / name, flags, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    sys.argv = ["run", str(directory)]
    sys.exit(main())


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan_of(action: str, **fields: Any) -> Plan:
    """Return a Plan from JSON types."""
    return Plan.model_validate({"action": action, **fields})
