"""The Celery application: a queue of hints. It never imports torch; what a hint means, the database says.

celery --app worker.celery_app worker      or, with all options set, python -m worker
"""

import os
import signal
from types import FrameType
from typing import Any

from billiard import current_process
from celery import Celery
from celery.signals import (
    setup_logging,
    worker_init,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
)

from app.logs import configure_logs
from app.settings import load_settings, read_settings
from app.tracing import check_tracing, start_tracing
from worker import shutdown
from worker.production import check_worker
from worker.queues import name_queue
from worker.sandbox.detect import detect
from worker.settings import WorkerSettings
from worker.shares import divide

# SIGTERM shall stop softly: jobs go on for stop_seconds, then they are given back.
os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")

settings = load_settings()
worker_settings = read_settings(WorkerSettings)
check_worker(settings, worker_settings)
check_tracing()
shares = divide(settings, worker_settings)

app = Celery("pare", include=["worker.tasks"])
app.conf.update(
    broker_url=settings.broker_url,
    task_default_queue=name_queue(shares[0].accepts[0]),
    task_acks_late=False,  # crash recovery is the duty of the database's leases
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_soft_shutdown_timeout=worker_settings.stop_seconds,
    worker_enable_remote_control=False,
    worker_cancel_long_running_tasks_on_connection_loss=True,
    worker_concurrency=len(shares),
    worker_pool="prefork",
    worker_proc_alive_timeout=60,
    task_serializer="json",
    accept_content=["json"],
    task_time_limit=None,  # the supervisor ends engines, with all their children
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "visibility_timeout": 3600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
    },
)


@setup_logging.connect(weak=False)
def _log_our_way(**_: Any) -> None:
    configure_logs("worker")


@worker_init.connect(weak=False)
def _find_isolation(**_: Any) -> None:
    detect(settings.isolation)  # once, before the children are forked


@worker_ready.connect(weak=False)
def _note_stop(**_: Any) -> None:
    # Celery's own signal for it comes when the jobs have had their time already.
    end_softly = signal.getsignal(signal.SIGTERM)
    assert callable(end_softly), "Celery has set it"

    def stop(number: int, frame: FrameType | None) -> None:
        shutdown.begin()
        end_softly(number, frame)

    signal.signal(signal.SIGTERM, stop)


@worker_process_init.connect(weak=False)
def _open(**_: Any) -> None:
    from worker import tasks
    from worker.slot import open_slot, watch_for_end

    start_tracing("worker")
    # The pool numbers its children from 0, and gives the number of one that ended to the one that replaces it.
    tasks.slot = open_slot(settings, worker_settings, shares[current_process().index])
    watch_for_end(tasks.slot)


@worker_process_shutdown.connect(weak=False)
def _close(**_: Any) -> None:
    from worker import tasks

    if tasks.slot is not None:
        tasks.slot.close()
        tasks.slot = None
