"""The nouns of the service as objects with verbs: models, datasets, jobs, techniques, workers, artifacts."""

import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pare.errors import JobCancelled, JobFailed, UploadRejected, UsageError, WaitTimeout
from pare.events import follow
from pare.metrics import Metrics
from pare.records import Artifact, Dataset, Event, Job, Model, Technique, Worker, read
from pare.transfer import download, upload
from pare.transport import OnBytes, Transport

OnEvent = Callable[[Event], None]
_ONNX_HEAD = re.compile(rb"\x08[\x03-\x1e][\x12\x1a\x22\x28\x32\x3a\x42\x72]", re.DOTALL)
"""The version of the format, a small number, and the tag of another field of the file."""
_CONFIG_ENTRY = re.compile(rb"PK\x01\x02.{42}(?:[A-Za-z0-9_.\-]{1,200}/)?config\.json", re.DOTALL)
Checked = TypeVar("Checked", Model, Dataset)
DATASET_FORMATS: dict[str, Literal["npz", "safetensors", "parquet", "images"]] = {
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".zip": "images",
}
"""Suffix of a file -> its format."""


class Models:
    """Uploaded models."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self,
        file: Path | str,
        *,
        name: str | None = None,
        format: str | None = None,
        architecture: str | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Model:
        """Upload a model file. Its check goes on in the service; `wait` for it before submitting jobs.

        `format` is pt2, hf (a zip of a Hugging Face folder), safetensors or onnx; without it, the file tells.
        A safetensors file needs the `architecture` that uses its weights (see `architectures`).
        """
        path = Path(file)
        form = format or model_format(path)
        if form == "safetensors" and architecture is None:
            raise UsageError(
                f"{path.name} holds weights without a program",
                fix="Name the architecture that uses them, for example architecture='resnet20' (`pare models "
                "architectures` lists them), or give the live module.",
            )
        params = {"name": name or path.stem, "format": form}
        if architecture is not None:
            params["architecture"] = architecture
        return read(Model, upload(self._transport, "/v1/models", path, params, on_bytes))

    def get(self, id: str) -> Model:
        """Return one model with what its check found."""
        return read(Model, self._transport.get(f"/v1/models/{id}"))

    def list(self, *, limit: int = 100) -> tuple[Model, ...]:
        """Return the newest models."""
        return tuple(read(Model, item) for item in pages(self._transport, "/v1/models", limit))

    def wait(self, id: str, *, timeout_seconds: float = 600.0) -> Model:
        """Return the model once its check is done; raises UploadRejected with the reason if it is not accepted."""
        return wait_for_check("model", self.get, id, timeout_seconds)

    def architectures(self) -> tuple[dict[str, Any], ...]:
        """Return the architectures that a safetensors file can be uploaded for, with their parameters."""
        return tuple(self._transport.get("/v1/architectures")["items"])

    def delete(self, id: str) -> None:
        """Delete a model that no unfinished job uses."""
        self._transport.request("DELETE", f"/v1/models/{id}")


class Datasets:
    """Uploaded datasets."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, file: Path | str, *, name: str | None = None, on_bytes: OnBytes | None = None) -> Dataset:
        """Upload a .npz, .safetensors or .parquet file of equally long columns, or a .zip with a folder per class."""
        path = Path(file)
        params = {"name": name or path.stem, "format": dataset_format(path)}
        return read(Dataset, upload(self._transport, "/v1/datasets", path, params, on_bytes))

    def get(self, id: str) -> Dataset:
        """Return one dataset with its columns."""
        return read(Dataset, self._transport.get(f"/v1/datasets/{id}"))

    def list(self, *, limit: int = 100) -> tuple[Dataset, ...]:
        """Return the newest datasets."""
        return tuple(read(Dataset, item) for item in pages(self._transport, "/v1/datasets", limit))

    def wait(self, id: str, *, timeout_seconds: float = 600.0) -> Dataset:
        """Return the dataset once its check is done; raises UploadRejected if it is not accepted."""
        return wait_for_check("dataset", self.get, id, timeout_seconds)

    def delete(self, id: str) -> None:
        """Delete a dataset that no unfinished job uses."""
        self._transport.request("DELETE", f"/v1/datasets/{id}")


class Jobs:
    """Requests to run a recipe on a model."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(
        self,
        model_id: str,
        recipe: dict[str, Any],
        *,
        labels: dict[str, str] | None = None,
        priority: int | None = None,
        deadline_seconds: int | None = None,
        needs: dict[str, Any] | None = None,
        webhook_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Submit a job. It exists once, however often a broken connection made us ask: the request carries a key.

        `needs` is what the worker must have that runs it, for example {"device": "gpu", "memory_bytes": 2**34}.
        `webhook_id` names a webhook that hears of it.
        """
        body = _job_body(model_id, recipe, labels, priority, deadline_seconds, needs)
        if webhook_id is not None:
            body["webhook_id"] = webhook_id
        headers = {"Idempotency-Key": f'"{idempotency_key or uuid.uuid4()}"'}
        response = self._transport.request("POST", "/v1/jobs", json=body, headers=headers, repeatable=True)
        return read(Job, response.json())

    def validate(
        self, model_id: str, recipe: dict[str, Any], *, priority: int | None = None, needs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Check a job without submitting it; returns the service's estimate, and whether a worker could run it."""
        body = _job_body(model_id, recipe, None, priority, None, needs)
        answer: dict[str, Any] = self._transport.request(
            "POST", "/v1/jobs", params={"dry_run": "true"}, json=body, repeatable=True
        ).json()
        return answer

    def get(self, id: str) -> Job:
        """Return one job as it is now."""
        return read(Job, self._transport.get(f"/v1/jobs/{id}"))

    def list(self, *, limit: int = 100) -> tuple[Job, ...]:
        """Return the newest jobs."""
        return tuple(read(Job, item) for item in pages(self._transport, "/v1/jobs", limit))

    def follow(self, id: str, *, after: int = 0) -> Iterator[Event]:
        """Yield the job's events, past and coming, until its last."""
        return follow(self._transport, id, after)

    def wait(self, id: str, *, timeout_seconds: float | None = None, on_event: OnEvent | None = None) -> Job:
        """Return the job once it has finished, however it ended."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for event in follow(self._transport, id, 0, deadline=deadline):
            if on_event is not None:
                on_event(event)
        job = self.get(id)
        if not job.finished:
            raise WaitTimeout(f"job {id}", timeout_seconds or 0.0)
        return job

    def events(self, id: str, *, after: int = 0, limit: int = 200) -> dict[str, Any]:
        """Return one page of events: {items, last_seq, finished}."""
        page: dict[str, Any] = self._transport.get(f"/v1/jobs/{id}/events", after=after, limit=limit)
        return page

    def logs(self, id: str, *, attempt: int | None = None) -> str:
        """Return the log of an attempt (the last, if not said)."""
        return self._transport.request("GET", f"/v1/jobs/{id}/logs", params={"attempt": attempt}).text

    def cancel(self, id: str) -> Job:
        """Ask for an end; a running job is `cancelling` until its process is gone."""
        return read(Job, self._transport.request("POST", f"/v1/jobs/{id}/cancel", repeatable=True).json())

    def retry(self, id: str, *, fresh: bool = False) -> Job:
        """Queue a failed or cancelled job again: from its last checkpoint, or from the beginning if `fresh`.

        A job made of others goes on where it ended.
        """
        params = {"fresh": "true"} if fresh else None
        return read(Job, self._transport.request("POST", f"/v1/jobs/{id}/retry", params=params).json())

    def delete(self, id: str) -> None:
        """Delete a finished job with its artifacts."""
        self._transport.request("DELETE", f"/v1/jobs/{id}")

    def metrics(self, id: str) -> Metrics:
        """Return the numbers of a job that succeeded."""
        return read(Metrics, self._transport.get(f"/v1/jobs/{id}/metrics"))

    def artifacts(self, id: str) -> tuple[Artifact, ...]:
        """Return the files a job made."""
        return tuple(read(Artifact, item) for item in self._transport.get(f"/v1/jobs/{id}/artifacts")["items"])

    def download(self, id: str, directory: Path | str, *, on_bytes: OnBytes | None = None) -> tuple[Path, ...]:
        """Download and verify every artifact of a job; what is already there and right is kept."""
        return tuple(download(self._transport, item, Path(directory), on_bytes) for item in self.artifacts(id))


class Techniques:
    """What the service can do."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> tuple[Technique, ...]:
        """Return every technique with the schema of its parameters."""
        return tuple(read(Technique, item) for item in self._transport.get("/v1/techniques")["items"])


class Workers:
    """The processes that run jobs."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> tuple[Worker, ...]:
        """Return the workers that are alive, oldest first."""
        return tuple(read(Worker, item) for item in self._transport.get("/v1/workers")["items"])


class Artifacts:
    """Files that jobs made."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def download(self, artifact: Artifact, directory: Path | str, *, on_bytes: OnBytes | None = None) -> Path:
        """Download and verify one artifact."""
        return download(self._transport, artifact, Path(directory), on_bytes)


def raise_unless_succeeded(job: Job) -> None:
    """Raise JobFailed or JobCancelled for a job that finished without a result."""
    if job.status == "cancelled":
        raise JobCancelled(job.id)
    if job.status == "failed":
        raise JobFailed(job.id, job.raw.get("error"))


def model_format(file: Path) -> Literal["pt2", "hf", "safetensors", "onnx"]:
    """Return the model format that a file's content says, or else its name."""
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
            stream.seek(max(0, stream.seek(0, 2) - 2**20))
            tail = stream.read()
    except OSError:
        raise UsageError(f"{file} is not a file", fix="Give the path of the file to upload.") from None
    if head.startswith(b"PK\x03\x04"):
        # A zip's list of members stands at its end.
        return "hf" if _CONFIG_ENTRY.search(tail) and b"archive_format" not in tail else "pt2"
    if file.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    if file.suffix == ".onnx" or _ONNX_HEAD.match(head):
        return "onnx"
    return "pt2"


def dataset_format(file: Path) -> Literal["npz", "safetensors", "parquet", "images"]:
    """Return the dataset format a file name says."""
    found = DATASET_FORMATS.get(file.suffix.lower())
    if found is None:
        raise UsageError(
            f"{file.name} is neither .npz, .safetensors, .parquet nor a .zip of images",
            fix="Save the columns with numpy.savez(path, x=..., y=...) or safetensors.numpy.save_file.",
        )
    return found


def pages(transport: Transport, path: str, limit: int, **params: Any) -> Iterator[dict[str, Any]]:
    """Yield up to `limit` items of a list, page by page."""
    cursor: str | None = None
    while limit > 0:
        page = transport.get(path, limit=min(limit, 200), cursor=cursor, **params)
        yield from page["items"][:limit]
        limit -= len(page["items"])
        cursor = page["next_cursor"]
        if cursor is None:
            return


def wait_for_check(kind: str, get: Callable[[str], Checked], id: str, timeout_seconds: float) -> Checked:
    """Poll a model or dataset until the service has checked it."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.05
    while True:
        item = get(id)
        if item.state == "ready":
            return item
        if item.state == "rejected":
            raise UploadRejected(kind, id, item.raw.get("error") or {})
        if time.monotonic() > deadline:
            raise WaitTimeout(f"the check of {kind} {id}", timeout_seconds)
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)


def _job_body(
    model_id: str,
    recipe: dict[str, Any],
    labels: dict[str, str] | None,
    priority: int | None,
    deadline_seconds: int | None,
    needs: dict[str, Any] | None,
) -> dict[str, Any]:
    body = {
        "model_id": model_id,
        "recipe": recipe,
        "labels": labels,
        "priority": priority,
        "deadline_seconds": deadline_seconds,
        "needs": needs or None,
    }
    return {name: value for name, value in body.items() if value is not None}
