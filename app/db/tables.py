"""The tables. The database is the only source of truth; the meaning of each state is in app/jobs/lifecycle.py."""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.db.types import UtcDateTime
from app.recipes.needs import DeviceKind

JsonValue = dict[str, Any]


class Base(DeclarativeBase):
    """All tables."""

    # Without none_as_null an absent value would be stored as the JSON text "null".
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        JsonValue: JSON(none_as_null=True),
        list[Any]: JSON,
        int: BigInteger,
    }
    # Named constraints can be changed by later migrations on every database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class ModelRow(Base):
    """An uploaded, immutable program."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), index=True)
    name: Mapped[str] = mapped_column(String(200))
    format: Mapped[str] = mapped_column(String(20))
    architecture: Mapped[str | None] = mapped_column(String(300))
    """safetensors: the catalogue's program for the weights, with its parameters."""
    state: Mapped[str] = mapped_column(String(20))
    """checking, ready or rejected."""
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    facts: Mapped[JsonValue | None]
    """ModelFacts, once ready."""
    error: Mapped[JsonValue | None]
    """code, detail, fix; once rejected."""
    made_by: Mapped[str | None] = mapped_column(String(40), index=True)
    """The job made of others whose part left this model for its next part; null: uploaded by the user.

    No foreign key: jobs refer to models already. Whoever deletes the job deletes it.
    """
    created_at: Mapped[datetime]
    __table_args__ = (Index("ix_models_created", "created_at", "id"),)


class DatasetRow(Base):
    """Uploaded, immutable examples."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), index=True)
    name: Mapped[str] = mapped_column(String(200))
    format: Mapped[str] = mapped_column(String(20))
    state: Mapped[str] = mapped_column(String(20))
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    facts: Mapped[JsonValue | None]
    """DatasetFacts, once ready."""
    error: Mapped[JsonValue | None]
    created_at: Mapped[datetime]
    __table_args__ = (Index("ix_datasets_created", "created_at", "id"),)


class JobRow(Base):
    """A unit of engine work: a user's optimize job, or the check of an upload (not listed under /v1/jobs).

    Or a job made of others, its parts (app/jobs/parents.py): no worker claims it.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), index=True)
    action: Mapped[str] = mapped_column(String(20))
    """optimize, check_model or check_dataset; distill: made of parts."""
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    """The job that this one is a part of."""
    part: Mapped[str | None] = mapped_column(String(60))
    """Which part: a name that is unique in the parent."""
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    """check_dataset: the dataset to check. optimize: recipe.data.dataset_id."""
    evaluation_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))
    webhook_id: Mapped[str | None] = mapped_column(ForeignKey("webhooks.id", ondelete="SET NULL"))
    """The endpoint that the job named: it hears of the job whatever else it hears of."""
    request_id: Mapped[str | None] = mapped_column(String(64))
    """The request that submitted it, or the job that it is a part of: every line of a log about it names this id."""
    traceparent: Mapped[str | None] = mapped_column(String(55))
    """The span of that request (W3C Trace Context); null where nothing is traced."""
    recipe: Mapped[JsonValue | None]
    """optimize: a Recipe. distill: a Distillation."""
    labels: Mapped[JsonValue]
    priority: Mapped[int] = mapped_column(Integer)
    deadline_seconds: Mapped[int | None] = mapped_column(Integer)
    needs_device: Mapped[DeviceKind] = mapped_column(String(10), server_default="cpu")
    needs_num_devices: Mapped[int] = mapped_column(Integer, server_default="0")
    needs_memory_bytes: Mapped[int] = mapped_column(server_default="0")
    needs_num_threads: Mapped[int] = mapped_column(Integer, server_default="1")

    state: Mapped[str] = mapped_column(String(20))
    attempt: Mapped[int] = mapped_column(Integer)
    max_attempts: Mapped[int] = mapped_column(Integer)
    epoch: Mapped[int]
    """Fencing token: rises with each claim; every write of an attempt carries it."""
    worker_id: Mapped[str | None] = mapped_column(String(80))
    lease_until: Mapped[datetime | None]
    published_at: Mapped[datetime | None]
    """When a wake-up hint was last sent; the sweep sends another when the job still waits."""
    claimed_at: Mapped[datetime | None]
    """When it was last claimed: its owner's turn."""
    waiting_reason: Mapped[str | None] = mapped_column(String(40))
    """Why no worker can run it, as its newest `waiting` event says; null where one can."""

    stage: Mapped[str | None] = mapped_column(String(50))
    progress: Mapped[JsonValue]
    error: Mapped[JsonValue | None]
    metrics: Mapped[JsonValue | None]
    verdict: Mapped[JsonValue | None]
    isolation: Mapped[list[Any]]
    """Names of the isolation layers active in the latest attempt."""
    last_seq: Mapped[int]
    """The sequence number of the newest event."""
    resumed_from: Mapped[JsonValue | None]
    """stage, step, fraction of the checkpoint that the latest attempt went on from."""

    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint("parent_id", "part"),
        Index("ix_jobs_state_lease", "state", "lease_until"),
        Index("ix_jobs_state_published", "state", "published_at"),
        Index("ix_jobs_created", "created_at", "id"),
        # The order in which waiting jobs are claimed; the last columns say from the index alone who can run them.
        Index(
            "ix_jobs_waiting",
            "state", "needs_device", "priority", "owner", "created_at", "id",
            "needs_num_devices", "needs_memory_bytes", "needs_num_threads",
        ),
        Index("ix_jobs_owner_claimed", "owner", "claimed_at"),
    )  # fmt: skip


class EventRow(Base):
    """Something that happened to a job; `seq` counts from 1 without gaps."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    """state, progress, checkpoint or resumed."""
    data: Mapped[JsonValue]
    created_at: Mapped[datetime]


class ArtifactRow(Base):
    """A file a job made. Rows appear in the transaction that finishes the job, never before."""

    __tablename__ = "artifacts"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    owner: Mapped[str] = mapped_column(String(40), index=True)
    name: Mapped[str] = mapped_column(String(100))
    media_type: Mapped[str] = mapped_column(String(100))
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    epoch: Mapped[int]
    created_at: Mapped[datetime]
    __table_args__ = (UniqueConstraint("job_id", "name"),)


class CheckpointRow(Base):
    """What a job can go on from after a crash: a blob in its own section of storage. Dropped when the job succeeds."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    """That of the event that tells of it."""
    epoch: Mapped[int]
    """Of the attempt that wrote it."""
    stage: Mapped[str] = mapped_column(String(50))
    step: Mapped[int | None] = mapped_column(Integer)
    """Index into recipe.steps where the stage is a step."""
    fraction: Mapped[float] = mapped_column(Float)
    """Of the whole job."""
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int]
    created_at: Mapped[datetime]


class UploadRow(Base):
    """A file on its way in, part by part, until a model or a dataset is made of it."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), index=True)
    size_bytes: Mapped[int]
    """Of the whole file."""
    offset_bytes: Mapped[int]
    """What has arrived, and is safe."""
    description: Mapped[str | None] = mapped_column(Text)
    """The Upload-Metadata header, as it was sent."""
    made: Mapped[str | None] = mapped_column(String(40))
    """The model or dataset that was made of it; its parts are gone then."""
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)


class UploadPartRow(Base):
    """Bytes of a resumable upload that are safe: a blob in the upload's own section of storage."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    start_bytes: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Where in the file it begins."""
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))


class OutboxRow(Base):
    """A wake-up hint to publish, written in the transaction that queued its job."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]


class WebhookRow(Base):
    """An endpoint of an owner's that hears what happens to jobs."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40))
    url: Mapped[str] = mapped_column(String(2048))
    description: Mapped[str] = mapped_column(String(200))
    events: Mapped[list[Any]]
    """The types of messages that it takes."""
    jobs: Mapped[str] = mapped_column(String(10))
    """all: the owner's; named: those that name this endpoint."""
    secret: Mapped[str] = mapped_column(String(100))
    """As it was shown, because every message is signed with it."""
    old_secret: Mapped[str | None] = mapped_column(String(100))
    old_secret_until: Mapped[datetime | None]
    """Until then messages are signed with the old secret as well."""
    disabled_reason: Mapped[str | None] = mapped_column(String(40))
    """Why nothing is sent: by_owner, or gone (it answered 410); null while it is enabled."""
    created_at: Mapped[datetime]
    __table_args__ = (Index("ix_webhooks_owner_created", "owner", "created_at", "id"),)


class DeliveryRow(Base):
    """A message to one endpoint, written in the transaction in which happened what it tells of."""

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """The webhook-id: the same in every attempt."""
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    owner: Mapped[str] = mapped_column(String(40))
    job_id: Mapped[str | None] = mapped_column(String(40))
    """No foreign key: the message tells of the job even when that is deleted meanwhile."""
    type: Mapped[str] = mapped_column(String(40))
    body: Mapped[str] = mapped_column(Text)
    """The bytes that are signed and sent, in every attempt the same."""
    state: Mapped[str] = mapped_column(String(20))
    """pending, delivered or failed."""
    num_attempts: Mapped[int] = mapped_column(Integer)
    """Of the current round, an attempt that is going on included; a redelivery begins another round."""
    attempts: Mapped[list[Any]]
    """What came of each attempt of all rounds: at, status, error, milliseconds. The newest are kept."""
    due_at: Mapped[datetime | None]
    """When the next attempt is made; null when none is."""
    lease_until: Mapped[datetime | None]
    """An attempt is going on; if it is not over by then, its process died."""
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_deliveries_state_due", "state", "due_at"),
        Index("ix_deliveries_webhook_created", "webhook_id", "created_at", "id"),
    )


class LogRow(Base):
    """The engine's log of one attempt: a capped blob in storage."""

    __tablename__ = "logs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime]


class IdempotencyRow(Base):
    """The remembered answer to a request that carried an Idempotency-Key."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(40), primary_key=True)
    route: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    status: Mapped[int] = mapped_column(Integer)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]


class WorkerRow(Base):
    """A worker process and what it can isolate; refreshed with each heartbeat."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(80), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    queue: Mapped[str] = mapped_column(String(20))
    """The queues it takes hints from, with commas between them."""
    facts: Mapped[JsonValue]
    """devices, memory_bytes, num_threads, accepts, isolation, versions, ..."""
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class DispatcherRow(Base):
    """A dispatcher process, and whether it reaches the broker; refreshed every few seconds."""

    __tablename__ = "dispatchers"

    id: Mapped[str] = mapped_column(String(80), primary_key=True)
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    broker_seen_at: Mapped[datetime | None]
    """When the broker last answered it."""
