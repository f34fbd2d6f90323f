"""`python -m worker.dispatch`: publish hints, wake idle workers, take jobs from workers that went silent.

It also lets jobs that are made of others go on to their next part, sends webhooks, and removes files that nothing needs
any more.

Any number may run. All state is in the database; this process can be killed at any time.
"""

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from opentelemetry.trace import SpanKind
from redis.exceptions import RedisError

from app.db.session import Database
from app.errors import PareError
from app.files.collect import collect
from app.files.resumable import forget_uploads
from app.ids import new_id
from app.jobs import (
    Hint,
    advance_parents,
    count_waiting,
    forget_files,
    forget_workers,
    list_workers,
    name_for_logs,
    note_waits,
    reap_expired,
    relay_outbox,
    sweep_unpublished,
    wake_workers,
)
from app.jobs.dispatchers import forget_dispatchers, remove_dispatcher, touch_dispatcher
from app.jobs.outbox import MAX_HINTS
from app.logs import configure_logs
from app.production import check_production
from app.recipes.needs import DEVICE_KINDS, DeviceKind
from app.settings import Settings, load_settings
from app.storage import open_storage
from app.tracing import continue_trace, start_tracing, stop_tracing, tracer
from app.webhooks.addresses import Destinations
from app.webhooks.deliveries import forget_deliveries
from app.webhooks.sending import Sender
from worker.couriers import Couriers
from worker.queues import name_queue

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.5, 10.0
_LOOK_SECONDS = 0.2
_FORGET_FACTOR = 60
_log = structlog.get_logger(__name__)


def make_publisher(broker_url: str) -> tuple[Celery, Callable[[Hint], None]]:
    """Return a Celery client that fails fast, and the function that publishes one hint with it."""
    client = Celery("pare-dispatch", broker=broker_url, set_as_current=False)
    client.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        broker_connection_retry=False,
        broker_pool_limit=1,
        broker_transport_options={"socket_timeout": 2, "socket_connect_timeout": 2, "max_retries": 0},
    )

    def publish(hint: Hint) -> None:
        # ignore_result and no retry: the outbox row stays until this returns.
        queue = name_queue(hint.device)
        # What is in the message is said in words too, for tools that show queues; Celery need not work them out.
        words = {"argsrepr": repr([hint.job_id]), "kwargsrepr": "{}"}
        client.send_task("pare.run_job", args=[hint.job_id], queue=queue, retry=False, ignore_result=True, **words)

    return client, publish


class Dispatcher:
    """Runs each duty at its interval; a duty that fails is tried again later, and the others go on."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._storage = open_storage(settings.storage_url, settings.storage_reserve_bytes)
        self._client, self._publish = make_publisher(settings.broker_url)
        self._couriers = Couriers(database, Sender(Destinations(settings)))
        self._id = f"{socket.gethostname()[:60]}-{new_id('dsp')[4:12]}"
        self._stopping = threading.Event()
        self.told_to_stop = False
        """What a handler of signals may set: an event has a lock, which the code it interrupted may hold."""

    def run(self) -> None:
        """Go on until stopped."""
        duties = [
            (self._relay, self._settings.relay_interval_seconds),
            (self._reap, self._settings.reap_interval_seconds),
            (self._advance, self._settings.advance_interval_seconds),
            (self._sweep, min(self._settings.sweep_after_seconds / 4, 5.0)),
            (self._wake, self._settings.wake_interval_seconds),
            (self._note_waits, self._settings.wake_interval_seconds),
            (self._send_webhooks, self._settings.webhook_interval_seconds),
            (self._report, self._settings.health_seen_seconds / 4),
            (self._forget, 60.0),
        ]
        if self._settings.collect_interval_seconds:
            duties.append((self._collect, self._settings.collect_interval_seconds))
        threads = [
            threading.Thread(target=self._repeat, args=duty, daemon=True, name=duty[0].__name__) for duty in duties
        ]
        for thread in threads:
            thread.start()
        while not self.told_to_stop:
            time.sleep(_LOOK_SECONDS)
            # An error that nobody foresaw ends a duty; half a dispatcher must not look alive.
            ended = [thread.name for thread in threads if not thread.is_alive()]
            if ended:
                raise RuntimeError(f"these duties ended: {', '.join(ended)}")
        self._stopping.set()
        for thread in threads:
            thread.join(5)
        with suppress(PareError), self._database.session() as session:
            remove_dispatcher(session, self._id)
        self._couriers.join(5)
        self._client.close()

    def _repeat(self, duty: Callable[[], bool], interval_seconds: float) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            started_at = time.monotonic()
            try:
                more = duty()
                pause = _FIRST_PAUSE_SECONDS
            except (PareError, OperationalError, RedisError, OSError) as error:
                _log.warning("duty failed", duty=duty.__name__, error=str(error)[:300], again_in_seconds=pause)
                self._stopping.wait(pause)
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)
                continue
            if not more:
                self._stopping.wait(max(0.0, interval_seconds - (time.monotonic() - started_at)))

    def _relay(self) -> bool:
        # Hints that come one after the other wait for the end of the interval, and go out in one round: most of what a
        # round costs does not depend on how many they are.
        return relay_outbox(self._database, self._send) == MAX_HINTS

    def _send(self, hint: Hint) -> None:
        with tracer.start_as_current_span(
            "publish hint",
            context=continue_trace(hint.traceparent),
            kind=SpanKind.PRODUCER,
            attributes={"pare.job_id": hint.job_id, "pare.owner": hint.owner},
        ):
            self._publish(hint)
        _log.info("hint sent", job_id=hint.job_id, owner=hint.owner, request_id=hint.request_id)

    def _reap(self) -> bool:
        with self._database.session() as session:
            reaped = reap_expired(session)
        for names in self._name(reaped):
            _log.warning("its worker went silent", **names)
        return bool(reaped)

    def _advance(self) -> bool:
        return advance_parents(self._database, self._settings, self._storage) > 0

    def _sweep(self) -> bool:
        # With a hint for every waiting job in the queue nothing was lost: the workers are busy, and more hints would
        # only pile up in the broker.
        num_hints = self._count_hints()
        with self._database.session() as session:
            swept = [
                job_id
                for kind in DEVICE_KINDS
                if num_hints[kind] < count_waiting(session, kind)
                for job_id in sweep_unpublished(session, kind, self._settings.sweep_after_seconds)
            ]
        if swept:
            _log.info("hints sent again", job_ids=swept)
        return bool(swept)

    def _wake(self) -> bool:
        num_hints = self._count_hints()
        with self._database.session() as session:
            workers = list_workers(session, self._settings.worker_seen_seconds)
            woken = wake_workers(
                session,
                workers,
                num_hints,
                self._settings.wake_interval_seconds,
                self._settings.quota_running_jobs,
            )
        if woken:
            _log.info("idle workers woken", job_ids=woken)
        return False

    def _note_waits(self) -> bool:
        noted = note_waits(self._database, self._settings.worker_seen_seconds)
        for names in self._name(noted):
            _log.info("whether a worker can run it has changed", **names)
        return bool(noted)

    def _send_webhooks(self) -> bool:
        return self._couriers.send_due() > 0

    def _report(self) -> bool:
        try:
            self._count_hints()
            answers = True
        except (OperationalError, RedisError, OSError):
            answers = False
        with self._database.session() as session:
            touch_dispatcher(session, self._id, broker_answers=answers)
        return False

    def _name(self, job_ids: list[str]) -> list[dict[str, object]]:
        if not job_ids:
            return []
        with self._database.read() as session:
            return name_for_logs(session, job_ids)

    def _count_hints(self) -> dict[DeviceKind, int]:
        with self._client.connection_for_read() as connection:
            channel = connection.default_channel
            return {kind: int(channel.queue_declare(name_queue(kind)).message_count) for kind in DEVICE_KINDS}

    def _collect(self) -> bool:
        with self._database.session() as session:
            forget_uploads(session)
            if self._settings.keep_job_files_days:
                forget_files(session, self._settings.keep_job_files_days)
        collected = collect(self._database, self._storage, self._settings.collect_grace_seconds)
        if collected:
            _log.info("files that nothing needs removed", **asdict(collected))
        return False

    def _forget(self) -> bool:
        with self._database.session() as session:
            forget_dispatchers(session, self._settings.health_seen_seconds * _FORGET_FACTOR)
            forget_deliveries(session, self._settings.webhook_kept_days * 24 * 3600)
            return forget_workers(session, self._settings.worker_seen_seconds * _FORGET_FACTOR) > 0


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    configure_logs("dispatcher")
    try:
        settings = load_settings()
        check_production(settings)
        start_tracing("dispatcher")
    except PareError as error:
        print(f"error: {error.detail}\nfix: {error.fix}", file=sys.stderr)
        raise SystemExit(1) from None
    database = Database(settings.database_url)
    dispatcher = Dispatcher(database, settings)

    def stop(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
        dispatcher.told_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    _log.info("dispatching", broker=settings.broker_url.rsplit("@", 1)[-1])
    dispatcher.run()
    database.dispose()
    stop_tracing()


if __name__ == "__main__":
    main()
