"""What a job made, in the hands of the user: numbers, verdict, table, files, a callable model."""

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pare.errors import JobNotFinished, PareError
from pare.metrics import Metrics
from pare.records import Artifact, Job, Verdict
from pare.report import report, to_text
from pare.resources import Jobs, raise_unless_succeeded

Predict = Callable[[Mapping[str, Any]], dict[str, Any]]
"""From named input arrays to named output arrays."""


class Result:
    """A job and what it left behind. Everything is fetched when it is asked for."""

    def __init__(self, jobs: Jobs, job: Job, notes: tuple[str, ...] = ()) -> None:
        self._jobs = jobs
        self.job = job
        self.notes = notes
        """What the client had to decide on the way, e.g. that the model was exported with a fixed batch."""

    def __repr__(self) -> str:
        return f"Result(job_id={self.job.id!r}, status={self.job.status!r})"

    @property
    def job_id(self) -> str:
        """The id of the job."""
        return self.job.id

    @cached_property
    def metrics(self) -> Metrics:
        """All numbers, of the original and of the result."""
        self._require_success()
        return self._jobs.metrics(self.job.id)

    @property
    def verdict(self) -> Verdict:
        """The comparison in words."""
        return self.metrics.verdict

    def table(self) -> str:
        """Return original against result, and the verdict, as text."""
        return to_text(report(self.metrics))

    @cached_property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The files the job made."""
        self._require_success()
        return self._jobs.artifacts(self.job.id)

    def download(self, directory: Path | str) -> dict[str, Path]:
        """Download and verify every artifact; returns name -> path. A broken download goes on where it stopped."""
        self._require_success()
        return {path.name: path for path in self._jobs.download(self.job.id, directory)}

    def load(self, file: str | None = None, *, directory: Path | str | None = None) -> Predict:
        """Download the artifacts and return the model as a function of named numpy arrays.

        `file` is the artifact to load: model.onnx if there is one, else model.packed, model.pt2 or, native code that
        the worker compiled, model.aoti.pt2. The function comes from the job's own load.py, which needs onnxruntime or
        torch and nothing of Pare.
        """
        if directory is None:
            # Both runtimes read the whole model when it is loaded; the files are not needed afterwards.
            with tempfile.TemporaryDirectory(prefix="pare-") as temporary:
                return self.load(file, directory=temporary)
        files = self.download(directory)
        names = [name for name in ("model.onnx", "model.packed", "model.pt2", "model.aoti.pt2") if name in files]
        chosen = file or (names[0] if names else None)
        if chosen is None or chosen not in files or "load.py" not in files:
            raise PareError(
                f"job {self.job.id} has no artifact {chosen or 'model.onnx, .packed or .pt2'}: {sorted(files)}",
                code="nothing_to_load",
                fix="Name one of its files, or ask for the format in recipe.outputs.formats.",
            )
        spec = importlib.util.spec_from_file_location(f"pare_load_{self.job.id}", files["load.py"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        predict: Predict = module.load(files[chosen])
        return predict

    def refresh(self) -> "Result":
        """Ask the service again how the job is; for a result that was detached from."""
        self.job = self._jobs.get(self.job.id)
        return self

    def _require_success(self) -> None:
        if not self.job.finished:
            self.refresh()
        raise_unless_succeeded(self.job)
        if not self.job.finished:
            raise JobNotFinished(self.job.id, self.job.status)
