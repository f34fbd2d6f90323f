"""The settings of a worker alone, read from the environment (PARE_WORKER_CONCURRENCY, ...)."""

import sys
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024**2
GIB = 1024 * MIB


class WorkerSettings(BaseSettings):
    """Every setting with its default."""

    model_config = SettingsConfigDict(
        env_prefix="PARE_WORKER_", frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    concurrency: int | None = Field(None, ge=1, le=256)
    """Jobs that run at the same time; empty means one on each GPU or declared set of GPUs, and one without GPUs."""
    devices: str = "auto"
    """GPUs: auto takes all there are, cpu none; 0,1,2,3 are indexes, 0,1;2,3 sets of which each runs one job."""
    memory_bytes: int | None = Field(None, ge=256 * MIB)
    """Memory for its jobs together; empty means what the machine has, at most PARE_ENGINE_MEMORY_BYTES for each."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads for its jobs together; empty means PARE_ENGINE_THREADS for each."""
    takes_cpu_jobs: bool = False
    """A worker that has GPUs runs jobs that need none as well."""
    single_user: bool = False
    """Everything serves one person on this machine: jobs run even where no isolation works."""
    standby: bool = True
    """Keep an engine process warm, so that a job starts at once."""
    min_disk_bytes: int = Field(256 * MIB, ge=0)
    """A worker takes no jobs while the disk for their files has less than this left."""
    stop_seconds: float = Field(25, ge=0)
    """How long a stopping worker lets its jobs go on before it gives them back."""
    checkpoint_grace_seconds: float = Field(5, ge=0)
    """How long an engine may take to write a checkpoint when its job is given back."""
    progress_timeout_seconds: float = Field(3600, gt=0)
    """An engine that says nothing for this long is stuck."""
    progress_interval_seconds: float = Field(0.25, gt=0)
    """Progress is written at most this often."""
    cancel_poll_seconds: float = Field(1, gt=0)
    """How often a running job looks whether it was cancelled."""
    max_disk_bytes: int = Field(64 * GIB, ge=1)
    """All that one engine process may have on disk."""
    engine_command: tuple[str, ...] = ()
    """The engine's command line, a JSON list in which {job} is its directory; empty means our own. For fault tests."""
    engine_code: tuple[Path, ...] = ()
    """More paths that the engine may read. For fault tests."""

    def command(self) -> tuple[str, ...]:
        """Return the engine's command line."""
        return self.engine_command or (sys.executable, "-m", "worker.engine.run", "{job}")
