"""The settings of the service side, read from the environment (PARE_DATA_DIR, PARE_DATABASE_URL, ...)."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
from sqlalchemy import URL

from app.errors import ConfigurationError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

Kind = TypeVar("Kind", bound=BaseSettings)


def _absolute(value: Any) -> Path:
    return Path(value).expanduser().absolute()


AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]


class Settings(BaseSettings):
    """Every setting with its default; the defaults run everything on one machine under `data_dir`."""

    model_config = SettingsConfigDict(
        env_prefix="PARE_", frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    environment: Literal["development", "production"] = "development"
    """production: nothing starts with settings that are dangerous where others come in (`pare config check`)."""
    data_dir: AbsolutePath = Path("pare-data")
    """Where the embedded defaults keep the database, the files and the queue."""
    database_url: str = Field("", repr=False)
    """SQLAlchemy URL: sqlite:///... or postgresql+psycopg://...; empty means pare.sqlite3 in data_dir."""
    broker_url: str = Field("redis://127.0.0.1:6379/0", repr=False)
    """Redis or Valkey, carries wake-up hints only."""
    storage_url: str = Field("", repr=False)
    """Where files are kept: file:///... or s3://bucket/prefix?endpoint=...; empty means `store` in data_dir."""

    storage_reserve_bytes: int = Field(256 * MIB, ge=0)
    """Uploads and artifacts are refused when the disk of the store would have less than this left."""
    download_link_seconds: int = Field(300, ge=0, le=900)
    """On S3, downloads are answered with a link to the store that is good for this long; 0: Pare sends the bytes."""
    x_accel_redirect: str = Field("", pattern=r"^(/([A-Za-z0-9_-]+/)+)?$")
    """Location of the nginx in front, such as `/blobs/`, out of which it sends large files; empty: Pare sends them."""
    collect_interval_seconds: float = Field(300, ge=0)
    """How often the dispatcher removes files that nothing needs any more; 0: never."""
    collect_grace_seconds: float = Field(3600, ge=0)
    """A file stays at least this long, so that what names it has time to be written."""
    keep_job_files_days: float = Field(0, ge=0)
    """Artifacts, logs and checkpoints of a job go this long after its end; 0: they stay until the job is deleted."""

    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port the API listens on; 0 takes a free one."""

    auth: Literal["local", "keys"] = "local"
    """Who is asked for a key: nobody, which is allowed on loopback alone, or everybody."""
    key_environment: str = Field("live", pattern=r"^[a-z0-9]{1,16}$")
    """Stands in the keys of this service; give another one to a service that others' keys must not open."""

    quota_stored_bytes: int | None = Field(None, ge=0)
    """What each owner may store; None: no limit. Administrators can give an owner other limits than these four."""
    quota_running_jobs: int | None = Field(None, ge=0)
    """How many jobs of each owner may run at the same time; others wait."""
    quota_queued_jobs: int | None = Field(10_000, ge=0)
    """How many jobs of each owner may wait, with the unfinished ones that are made of others."""
    quota_requests_per_minute: int | None = Field(6_000, ge=0)
    """How many requests each owner may send in a minute."""

    audit_days: int = Field(365, ge=1)
    """How long the audit log keeps what was done."""

    max_model_bytes: int = Field(8 * GIB, ge=1)
    """Largest model upload."""
    max_dataset_bytes: int = Field(32 * GIB, ge=1)
    """Largest dataset upload."""
    upload_expiry_seconds: float = Field(24 * 3600, gt=0)
    """A resumable upload to which nothing was added for this long is forgotten."""
    max_body_bytes: int = Field(1 * MIB, ge=1)
    """Largest JSON body."""

    webhook_schemes: tuple[Literal["https", "http"], ...] = ("https",)
    """Schemes that the URL of a webhook may have."""
    webhook_ports: tuple[int, ...] = (443, 8443)
    """Ports that webhooks may be sent to."""
    webhook_networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    """Networks that are not public and that webhooks may be sent to nevertheless, for example ["10.1.2.0/24"]."""
    webhook_interval_seconds: float = Field(0.5, gt=0)
    """How often the dispatcher looks for messages to send to webhooks."""
    webhook_kept_days: float = Field(30, gt=0)
    """Messages to webhooks are kept for this long after their last attempt."""

    lease_seconds: float = Field(30, gt=0)
    """A worker that is silent for this long has lost its job."""
    heartbeat_seconds: float = Field(10, gt=0)
    """How often a worker renews its lease."""
    reap_interval_seconds: float = Field(2, gt=0)
    """How often the dispatcher looks for expired leases."""
    advance_interval_seconds: float = Field(1, gt=0)
    """How often the dispatcher looks at jobs that are made of others."""
    sweep_after_seconds: float = Field(30, gt=0)
    """A job that waits this long after its last hint gets another."""
    relay_interval_seconds: float = Field(0.2, gt=0)
    """How often the dispatcher publishes waiting hints."""
    wake_interval_seconds: float = Field(1, gt=0)
    """How often the dispatcher looks for idle workers that could run a job, and for jobs that no worker can run."""
    worker_seen_seconds: float = Field(30, gt=0)
    """A worker not seen for this long is shown no more, and no job waits for it."""
    health_seen_seconds: float = Field(8, gt=0)
    """A dispatcher, broker or worker not seen for this long is gone for GET /health/ready."""
    max_attempts: int = Field(3, ge=1, le=100)
    """Executions of a job before a retryable failure becomes final."""
    cancel_grace_seconds: float = Field(10, ge=0)
    """Time between the polite and the forced end of a cancelled job."""
    default_deadline_seconds: int = Field(6 * 3600, ge=1)
    """Run time limit of one attempt when the job names none."""
    max_deadline_seconds: int = Field(7 * 24 * 3600, ge=1)
    """The longest run time limit a job may ask for."""
    check_deadline_seconds: int = Field(600, ge=1)
    """Run time limit for checking an upload."""

    isolation: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto"
    """How engine processes are isolated; auto takes the strongest that works here."""
    engine_memory_bytes: int = Field(8 * GIB, ge=256 * MIB)
    """Memory limit of an engine process; the ranks of a parallel plan share it."""
    engine_threads: int = Field(default_factory=lambda: max(1, os.cpu_count() or 1), ge=1, le=1024)
    """Threads of an engine process for training and checks."""
    checkpoint_seconds: float = Field(120, ge=0)
    """How often a job that trains writes down what it would need to go on after a crash; 0: after every step."""
    max_log_bytes: int = Field(8 * MIB, ge=1 * KIB)
    """The log of one attempt is cut here."""
    max_artifact_bytes: int = Field(16 * GIB, ge=1)
    """Largest single file an engine process may write."""
    max_events_per_attempt: int = Field(10_000, ge=10)
    """Progress beyond this many events updates the job without a new event."""

    @model_validator(mode="before")
    @classmethod
    def _fill_places(cls, values: dict[str, Any]) -> dict[str, Any]:
        data_dir = _absolute(values.get("data_dir") or "pare-data")
        database = URL.create("sqlite", database=str(data_dir / "pare.sqlite3"))
        filled = {
            "database_url": database.render_as_string(hide_password=False),
            "storage_url": (data_dir / "store").as_uri(),
        }
        return {**values, **{name: url for name, url in filled.items() if not values.get(name)}}

    @model_validator(mode="after")
    def _check_times(self) -> "Settings":
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                f"heartbeat_seconds {self.heartbeat_seconds} must be at most half of lease_seconds {self.lease_seconds}"
            )
        return self


def load_settings() -> Settings:
    """Read the settings from the environment."""
    return read_settings(Settings)


def read_settings(kind: type[Kind], **given: Any) -> Kind:
    """Read settings of a kind; raises ConfigurationError, which names the variables, where one is wrong."""
    try:
        return kind(**given)
    except SettingsError as error:
        raise ConfigurationError(str(error)) from error
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix", "")
        wrong = [
            f"{prefix}{place['loc'][0]}".upper() + f": {place['msg']}" if place["loc"] else place["msg"]
            for place in error.errors()
        ]
        raise ConfigurationError("; ".join(wrong)) from error


def check_exposure(settings: Settings) -> None:
    """Raise ConfigurationError where others could reach a service that asks nobody who they are."""
    if settings.auth == "local" and not is_loopback(settings.host):
        raise ConfigurationError(
            f"host {settings.host} lets other machines in, and PARE_AUTH=local asks nobody who they are",
            fix="Listen on 127.0.0.1; or set PARE_AUTH=keys, and make the first key with "
            "`python -m app.access create --owner NAME --scopes read,write,admin`.",
        )


def check_delivery(settings: Settings) -> None:
    """Raise ConfigurationError where a proxy is to send files that are on no disk."""
    if settings.x_accel_redirect and not settings.storage_url.startswith("file:"):
        raise ConfigurationError(
            f"PARE_X_ACCEL_REDIRECT={settings.x_accel_redirect} lets a proxy send files from its disk, and "
            "PARE_STORAGE_URL names a store that has none",
            fix="Leave PARE_X_ACCEL_REDIRECT out: downloads from S3 are links to the store "
            "(PARE_DOWNLOAD_LINK_SECONDS). Or keep the files on a disk: PARE_STORAGE_URL=file:///...",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
