"""The client: one object for a service, with its nouns as attributes and `optimize` for the whole way."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pare.distillations import Distillations
from pare.keys import Keys
from pare.optimize import DataLike, Given, Optimization
from pare.progress import ProgressDisplay
from pare.recipes import RecipeLike
from pare.resources import Artifacts, Datasets, Jobs, Models, Techniques, Workers
from pare.result import Result
from pare.transport import Transport
from pare.webhooks import Webhooks

if TYPE_CHECKING:
    from torch import nn


class Client:
    """A Pare service at `url` (default: the environment's PARE_URL, then http://127.0.0.1:8000).

    `api_key` (default: PARE_API_KEY) is sent to a service that asks for one; the one on your own machine does not.
    """

    def __init__(self, url: str | None = None, *, api_key: str | None = None) -> None:
        self.transport = Transport(url, api_key=api_key)
        self.models = Models(self.transport)
        self.datasets = Datasets(self.transport)
        self.jobs = Jobs(self.transport)
        self.distillations = Distillations(self.transport)
        self.techniques = Techniques(self.transport)
        self.artifacts = Artifacts(self.transport)
        self.webhooks = Webhooks(self.transport)
        self.workers = Workers(self.transport)
        self.keys = Keys(self.transport)

    @property
    def url(self) -> str:
        """The address of the service."""
        return self.transport.url

    def close(self) -> None:
        """Close the connections."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def health(self) -> dict[str, Any]:
        """Return what the service says about its parts: {"status": "ready|degraded|unavailable", "checks": ...}."""
        answer: dict[str, Any] = self.transport.request("GET", "/health/ready", accept_statuses=(503,)).json()
        return answer

    def me(self) -> dict[str, Any]:
        """Return who the service takes us for: {"owner", "scopes", "key", ...}."""
        answer: dict[str, Any] = self.transport.get("/v1/me")
        return answer

    def optimize(
        self,
        model: "nn.Module | str | Path",
        example_inputs: Any = None,
        *,
        recipe: RecipeLike,
        data: DataLike | None = None,
        evaluation_data: DataLike | None = None,
        task: str = "none",
        label_column: str | None = None,
        inputs: Mapping[str, str | dict[str, Any]] | None = None,
        name: str | None = None,
        dynamic_batch: bool = True,
        dynamic_shapes: Any = None,
        labels: dict[str, str] | None = None,
        priority: int | None = None,
        deadline_seconds: int | None = None,
        needs: dict[str, Any] | None = None,
        timeout_seconds: float | None = None,
        progress: bool = True,
    ) -> Result:
        """Make a model smaller and faster, and return the measured result.

        `model` is a torch.nn.Module (exported with `example_inputs`; it stays as it is), the path of a .pt2 file, or
        the id of an uploaded model. `recipe` is a whole recipe or only its list of steps. `data` is a dict of equally
        long arrays, the path of a .npz, .safetensors, .parquet or .zip (images) file, or the id of an uploaded dataset;
        its columns feed the model inputs of the same name, else in order (see pare.data), else as `inputs` says. With a
        `task`, the labels are in `label_column`: by default the column y, label or labels. Quality is measured on
        `evaluation_data`, which has the same columns, or else on a part of `data` that the service holds out.

        `labels`, `priority`, `deadline_seconds` and `needs` (what the worker must have) are those of `jobs.submit`.
        Blocks until the job has finished, with progress on stderr. Raises JobFailed or JobCancelled when there is no
        result. Ctrl-C while the job runs leaves it running and returns a Result to come back to.
        """
        given = Given(
            model, example_inputs, data, evaluation_data, task, label_column, inputs, name, dynamic_batch,
            dynamic_shapes,
        )  # fmt: skip
        return self._optimization(progress).run(
            given,
            recipe,
            labels=labels,
            priority=priority,
            deadline_seconds=deadline_seconds,
            needs=needs,
            timeout_seconds=timeout_seconds,
        )

    def distill(
        self,
        model: "nn.Module | str | Path",
        example_inputs: Any = None,
        *,
        data: DataLike,
        distillation: Mapping[str, Any],
        student: "nn.Module | str | Path | None" = None,
        evaluation_data: DataLike | None = None,
        task: str = "none",
        label_column: str | None = None,
        inputs: Mapping[str, str | dict[str, Any]] | None = None,
        labels: dict[str, str] | None = None,
        priority: int | None = None,
        deadline_seconds: int | None = None,
        timeout_seconds: float | None = None,
        progress: bool = True,
    ) -> Result:
        """Teach a smaller model what this one knows; return the measured student.

        `model` is the teacher and `data` its examples, as for `optimize`. `distillation` says the rest, as POST
        /v1/distillations takes it (docs/distillation.md): teacher_training, student, training, tuning; `{}` derives
        a student of half the width. `student` is a module, file or uploaded model to teach instead. The result's
        metrics hold the comparison with the same student taught without a teacher in `distillation`.
        """
        given = Given(model, example_inputs, data, evaluation_data, task, label_column, inputs)
        return self._optimization(progress).distill(
            given,
            self.distillations,
            distillation,
            student,
            labels=labels,
            priority=priority,
            deadline_seconds=deadline_seconds,
            timeout_seconds=timeout_seconds,
        )

    def result(self, job_id: str, *, timeout_seconds: float | None = None, progress: bool = True) -> Result:
        """Come back to a job: wait for it and return its result."""
        job = self.jobs.get(job_id)
        if not job.finished:
            display = ProgressDisplay(enabled=progress)
            with display:
                job = self.jobs.wait(job_id, timeout_seconds=timeout_seconds, on_event=display.event)
        return Result(self.jobs, job)

    def _optimization(self, progress: bool) -> Optimization:
        return Optimization(self.models, self.datasets, self.jobs, ProgressDisplay(enabled=progress))
