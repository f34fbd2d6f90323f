"""What a service that others reach must not have: settings that are fine on one's own machine and dangerous there.

`pare config check` shows every finding. With PARE_ENVIRONMENT=production no process starts while one is an error.
"""

import ipaddress
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from app.errors import ConfigurationError
from app.settings import Settings, is_loopback

Severity = Literal["error", "warning"]

MIN_SECRET_CHARACTERS = 12
_FEWEST_DIFFERENT = 5
WELL_KNOWN = frozenset(
    {"admin", "changeme", "default", "example", "letmein", "minio", "minioadmin", "pare", "password", "postgres",
     "redis", "root", "secret", "test"}
)  # fmt: skip
"""With or without digits behind."""
_ENCRYPTED = frozenset({"require", "verify-ca", "verify-full"})
_OF_THIS_MACHINE = ("127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8", "::1/128", "fe80::/10")
"""Loopback, link-local (where clouds keep their metadata), "this host"."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the settings."""

    code: str
    severity: Severity
    cause: str
    fix: str


class InsecureSettings(ConfigurationError):
    """These settings are not for production."""

    code = "insecure_settings"
    fix = "Correct each; `pare config check` shows them again."


def find_weaknesses(settings: Settings, environment: Mapping[str, str]) -> list[Finding]:
    """Return all that is wrong with the settings of the service; `environment` is that of the process."""
    return [
        *_look_at_access(settings, environment),
        *_look_at_database(settings.database_url, environment),
        *_look_at_broker(settings.broker_url),
        *_look_at_storage(settings, environment),
        *_look_at_directories(settings),
        *_look_at_webhooks(settings),
    ]


def check_production(settings: Settings, more: Sequence[Finding] = ()) -> None:
    """Raise InsecureSettings, which names all errors, where the settings say that this is production."""
    if settings.environment != "production":
        return
    errors = [each for each in (*find_weaknesses(settings, os.environ), *more) if each.severity == "error"]
    if errors:
        lines = [f"  {each.code}: {each.cause}\n    fix: {each.fix}" for each in errors]
        raise InsecureSettings("\n".join(["PARE_ENVIRONMENT=production refuses these settings:", *lines]))


def _look_at_access(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    if settings.auth == "local":
        yield Finding(
            "no_authentication",
            "error",
            "PARE_AUTH=local asks nobody who they are; a proxy in front of a loopback address lets everybody in",
            "Set PARE_AUTH=keys, and make the first key with `python -m app.access create`.",
        )
    if settings.isolation == "none":
        yield Finding(
            "no_isolation",
            "error",
            "PARE_ISOLATION=none opens uploaded models, which are strangers' programs, without a sandbox",
            "Set PARE_ISOLATION=auto; docs/security.md says what it needs.",
        )
    if {"*", "0.0.0.0/0", "::/0"} & {each.strip() for each in environment.get("FORWARDED_ALLOW_IPS", "").split(",")}:
        yield Finding(
            "forwarded_for_trusted",
            "error",
            "FORWARDED_ALLOW_IPS takes anybody's word for the address that a request comes from, so bad keys are "
            "counted for whom the sender names",
            "Name the address of the proxy alone.",
        )
    unlimited = [
        f"PARE_{name}".upper()
        for name in ("quota_stored_bytes", "quota_queued_jobs", "quota_requests_per_minute")
        if getattr(settings, name) is None
    ]
    if unlimited:
        yield Finding(
            "no_quota",
            "warning",
            f"without {' and '.join(unlimited)} one owner can leave nothing for the others",
            "Set them, or give each owner limits with PUT /v1/owners/{owner}/quota.",
        )
    if os.geteuid() == 0:
        yield Finding(
            "runs_as_root",
            "warning",
            "the process has the rights of root; whoever breaks out of it has the machine",
            "Run Pare as a user of its own, as its images do.",
        )


def _look_at_database(url: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    try:
        parsed = make_url(url)
    except ArgumentError:
        return  # nothing starts with it anyway
    if parsed.get_backend_name() == "sqlite":
        yield Finding(
            "sqlite_database",
            "error",
            "PARE_DATABASE_URL is SQLite: one file, one machine, one writer at a time",
            "Set PARE_DATABASE_URL=postgresql+psycopg://USER:PASSWORD@HOST/NAME.",
        )
        return
    query = {name: [value] if isinstance(value, str) else list(value) for name, value in parsed.query.items()}
    hosts = [each for each in [parsed.host, *query.get("host", [])] if each]
    if not any(_is_remote(host) for host in hosts):
        return
    password = parsed.password or environment.get("PGPASSWORD")
    proven = {"passfile", "sslcert", "service"} & set(query) or {"PGPASSFILE", "PGSSLCERT", "PGSERVICE"} & set(
        environment
    )
    if password:
        if _is_weak(password, parsed.username):
            yield _weak("database", "the password of PARE_DATABASE_URL")
    elif not proven:
        yield Finding(
            "database_without_password",
            "error",
            f"the database at {hosts[0]} is reached over the network without a password or certificate",
            "Give the user a password, in PARE_DATABASE_URL or PGPASSWORD.",
        )
    mode = (query.get("sslmode") or [environment.get("PGSSLMODE", "")])[0]
    if mode not in _ENCRYPTED and any(_is_far(host) for host in hosts):
        yield _in_clear("database", f"the database at {hosts[0]}", "Add ?sslmode=verify-full to PARE_DATABASE_URL.")


def _look_at_broker(url: str) -> Iterator[Finding]:
    parts = urlsplit(url)
    host = parts.hostname
    if host is None or not _is_remote(host):
        return
    if not parts.password:
        yield Finding(
            "broker_without_password",
            "error",
            f"the broker at {host} is reached over the network without a password: whoever reaches it can send hints, "
            "read them and stop all work",
            "Give it one (requirepass or an ACL user), and write redis://:PASSWORD@HOST:PORT/0.",
        )
    elif _is_weak(unquote(parts.password), parts.username):
        yield _weak("broker", "the password of PARE_BROKER_URL")
    if parts.scheme != "rediss" and _is_far(host):
        yield _in_clear("broker", f"the broker at {host}", "Use rediss:// in PARE_BROKER_URL.")


def _look_at_storage(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    parts = urlsplit(settings.storage_url)
    if parts.scheme != "s3":
        return
    secret = environment.get("AWS_SECRET_ACCESS_KEY")
    if secret and _is_weak(secret, environment.get("AWS_ACCESS_KEY_ID")):
        yield _weak("storage", "AWS_SECRET_ACCESS_KEY")
    if settings.download_link_seconds == 0:
        return  # no link is given out
    options = dict(parse_qsl(parts.query))
    public, endpoint = (urlsplit(options.get(name, "")) for name in ("public_endpoint", "endpoint"))
    shown = public if public.scheme else endpoint
    if shown.scheme == "http" and _is_remote(shown.hostname or ""):
        yield Finding(
            "download_links_in_clear",
            "error",
            f"links to files lead to http://{shown.hostname}: whoever sees one pass by can load the file",
            "Give the store TLS and name it as https:// in public_endpoint; or set PARE_DOWNLOAD_LINK_SECONDS=0.",
        )


def _look_at_directories(settings: Settings) -> Iterator[Finding]:
    parts, data = urlsplit(settings.storage_url), settings.data_dir.resolve()
    store = [Path(unquote(parts.path)).resolve()] if parts.scheme == "file" else []
    for path in dict.fromkeys([data, *store]):
        # Into a store below a data directory that is closed nobody gets.
        if _is_open(path) and not (data in path.parents and not _is_open(data)):
            yield Finding(
                "open_directory",
                "error",
                f"{path} lets every user of the machine get at what owners stored",
                f"chmod o-rwx {path}",
            )


def _is_open(path: Path) -> bool:
    try:
        return bool(stat.S_IMODE(path.stat().st_mode) & 0o007)
    except OSError:
        return False  # made with the right mode, or refused, when it is used


def _look_at_webhooks(settings: Settings) -> Iterator[Finding]:
    if "http" in settings.webhook_schemes:
        yield Finding(
            "webhooks_in_clear",
            "error",
            "PARE_WEBHOOK_SCHEMES allows http: messages to webhooks can be read and changed on their way",
            'Set PARE_WEBHOOK_SCHEMES=["https"].',
        )
    local = [ipaddress.ip_network(each) for each in _OF_THIS_MACHINE]
    for network in settings.webhook_networks:
        if any(network.version == each.version and network.overlaps(each) for each in local):
            yield Finding(
                "webhooks_reach_this_machine",
                "error",
                f"PARE_WEBHOOK_NETWORKS allows {network}, in which are this machine or the cloud's metadata: any owner "
                "could make the service send requests there",
                "Allow the networks of the receivers alone.",
            )
        else:
            yield Finding(
                "webhooks_reach_a_private_network",
                "warning",
                f"PARE_WEBHOOK_NETWORKS lets every owner make the service send requests to {network}",
                "Allow the addresses of the receivers alone.",
            )


def _weak(part: str, what: str) -> Finding:
    return Finding(
        f"weak_{part}_secret",
        "error",
        f"{what} is a well-known word, or has fewer than {MIN_SECRET_CHARACTERS} characters or hardly different ones",
        "Choose a random one: `openssl rand -hex 24`.",
    )


def _in_clear(part: str, what: str, fix: str) -> Finding:
    return Finding(f"{part}_in_clear", "warning", f"what goes to {what} is not encrypted, passwords included", fix)


def _is_weak(secret: str, name: str | None) -> bool:
    word = secret.rstrip("0123456789!").lower()
    return (
        len(secret) < MIN_SECRET_CHARACTERS
        or len(set(secret)) < _FEWEST_DIFFERENT
        or word in WELL_KNOWN
        or word == (name or "").lower() != ""
    )


def _is_remote(host: str) -> bool:
    """Whether a host is another machine: no loopback address, and no directory of a unix socket."""
    return not host.startswith("/") and not is_loopback(host)


def _is_far(host: str) -> bool:
    """Whether a host is neither here nor in a network of containers, whose names have no dots."""
    return _is_remote(host) and ("." in host or ":" in host)
