"""What the service answers, as small frozen dataclasses. Fields a newer service adds stay readable in `raw`."""

import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Error:
    """Why something was rejected or failed."""

    code: str
    detail: str
    fix: str = ""
    retryable: bool = False


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model. A size that may vary is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Layer:
    """One layer with weights."""

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    macs: int | None = None


@dataclass(frozen=True)
class Capability:
    """Whether a technique can work on a model, and on which layers."""

    kind: str
    applicable: bool
    layers: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the check of an uploaded model found."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dynamic_batch: bool
    batch_size: int | None
    exported_in: str
    parameters: int
    parameter_bytes: int
    macs: int | None = None
    layers: tuple[Layer, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    warnings: tuple[str, ...] = ()
    tokenizer: bool = False


@dataclass(frozen=True)
class Model:
    """An uploaded model."""

    id: str
    name: str | None
    format: str
    state: str
    size_bytes: int
    sha256: str
    created_at: str
    facts: ModelFacts | None = None
    error: Error | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Column:
    """One column of a dataset; `shape` is that of one row."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class DatasetFacts:
    """What the check of an uploaded dataset found."""

    num_rows: int
    columns: tuple[Column, ...]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """An uploaded dataset."""

    id: str
    name: str | None
    format: str
    state: str
    size_bytes: int
    sha256: str
    created_at: str
    facts: DatasetFacts | None = None
    error: Error | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """The comparison of result and original in words."""

    outcome: str
    summary: str
    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()
    within_noise: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobProgress:
    """How far a job is."""

    fraction: float = 0.0
    eta_seconds: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class Place:
    """A place in a job's work: of its newest checkpoint, or where the latest attempt went on."""

    stage: str
    fraction: float
    step: int | None = None
    size_bytes: int | None = None
    created_at: str | None = None


@dataclass(frozen=True)
class Needs:
    """What the worker must have that runs a job."""

    device: str = "cpu"
    num_devices: int = 0
    memory_bytes: int = 0
    num_threads: int = 1


@dataclass(frozen=True)
class Wait:
    """Why no living worker can run a job that waits."""

    reason: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Job:
    """A request to run a recipe on a model."""

    id: str
    model_id: str
    status: str
    attempt: int
    max_attempts: int
    recipe: dict[str, Any] | None
    """None where the job is made of others."""
    created_at: str
    stage: str | None = None
    progress: JobProgress | None = None
    worker: str | None = None
    checkpoint: Place | None = None
    resumed_from: Place | None = None
    error: Error | None = None
    verdict: Verdict | None = None
    isolation: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    deadline_seconds: int | None = None
    needs: Needs | None = None
    waiting: Wait | None = None
    num_jobs_ahead: int | None = None
    started_at: str | None = None
    finished_at: str | None = None
    parent_id: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        """Whether the job will not change any more."""
        return self.status in FINISHED


FINISHED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    seq: int
    kind: str
    data: dict[str, Any]
    created_at: str | None = None

    @property
    def finishes(self) -> bool:
        """Whether nothing follows this event."""
        return self.kind == "state" and self.data.get("state") in FINISHED


@dataclass(frozen=True)
class Artifact:
    """A file a job made."""

    id: str
    name: str
    media_type: str
    size_bytes: int
    sha256: str
    created_at: str
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Gpu:
    """A GPU of a worker."""

    index: int
    name: str
    memory_bytes: int | None = None
    uuid: str | None = None


@dataclass(frozen=True)
class Load:
    """How busy a worker is."""

    num_running: int
    capacity: int


@dataclass(frozen=True)
class Key:
    """A key of the service, without its text."""

    id: str
    owner: str
    name: str
    scopes: tuple[str, ...]
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None
    last_used_at: str | None = None
    replaced_by: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Worker:
    """A process that runs jobs, and what it has for one."""

    id: str
    accepts: tuple[str, ...]
    accepts_jobs: bool
    memory_bytes: int
    num_threads: int
    load: Load
    seen_at: str
    stopping: bool = False
    devices: tuple[Gpu, ...] = ()
    queues: tuple[str, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Technique:
    """A kind of optimization with the JSON schema of its parameters."""

    kind: str
    family: str
    summary: str
    needs: str
    leaves: str
    schema: dict[str, Any]
    defaults: dict[str, Any]
    undone_by: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


def read(record: type[T], data: dict[str, Any]) -> T:
    """Build `record` from a JSON object: nested records too, unknown keys ignored, absent keys at their default."""
    assert is_dataclass(record)
    values: dict[str, Any] = {}
    hints = _hints(record)
    for item in fields(record):
        if item.name == "raw":
            values["raw"] = data
        elif item.name in data:
            values[item.name] = _convert(hints[item.name], data[item.name])
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"the service's answer has no {item.name!r} for {record.__name__}: {sorted(data)}")
    return record(**values)


@cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _convert(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if is_dataclass(hint):
        return read(typing.cast("type[Any]", hint), value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return tuple(_convert(arguments[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        records = [argument for argument in arguments if is_dataclass(argument)]
        return _convert(records[0], value) if records else value
    return value
