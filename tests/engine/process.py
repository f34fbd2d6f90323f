"""Running the real engine process on a directory, as a worker would, without a sandbox around it."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from app.recipes.plan import EngineResult, Plan, Progress

TIMEOUT_SECONDS = 240


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
        env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def run(directory: Path, plan: Plan | bytes, files: dict[str, Path] | None = None) -> Finished:
    """Run one plan to its end."""
    prepare(directory, plan, files)
    log_path = directory / "log"
    with log_path.open("wb") as log, start(directory, log) as process:
        try:
            stdout, _ = process.communicate(b"go\n", timeout=TIMEOUT_SECONDS)
        finally:
            process.kill()
    path = directory / "out" / "result.json"
    return Finished(
        status=process.returncode,
        lines=[Progress.model_validate_json(line) for line in stdout.splitlines()],
        result=EngineResult.model_validate_json(path.read_bytes()) if path.exists() else None,
        log=log_path.read_text(encoding="utf-8", errors="replace"),
        directory=directory,
    )


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan_of(action: str, **fields: Any) -> Plan:
    """Return a Plan from JSON types."""
    return Plan.model_validate({"action": action, **fields})
