"""GET /metrics: the service in numbers, for Prometheus. What is true of all processes is read from the database."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.api.service import Parts, Service
from app.db.clock import db_now
from app.db.tables import ArtifactRow, CheckpointRow, DatasetRow, DeliveryRow, JobRow, LogRow, ModelRow, OutboxRow
from app.jobs import accepts_jobs, count_running, list_workers
from app.jobs.dispatchers import read_dispatch
from app.jobs.lifecycle import MADE_OF_PARTS, OWNED, TERMINAL, State
from app.recipes.needs import DEVICE_KINDS
from app.webhooks.announce import PENDING

router = APIRouter(tags=["health"])

RECENT_SECONDS = 3600.0
MAX_RECENT_JOBS = 1000
"""Of the newest jobs, those that ended lately are counted; the rest of the table is not read."""
STORED = (ModelRow, DatasetRow, ArtifactRow, CheckpointRow, LogRow)


@router.get(
    "/metrics",
    operation_id="scrape_metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Metrics in Prometheus' text format.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
def scrape(service: Parts) -> Response:
    """Show the state of the service in numbers, for Prometheus; of all owners together."""
    registry = CollectorRegistry()
    with service.database.read() as session:
        registry.register(_Collected(_collect(session, service)))
    return Response(generate_latest(registry) + service.measures.render(), media_type=CONTENT_TYPE_LATEST)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _collect(session: Session, service: Service) -> Iterator[Metric]:
    yield from _collect_queue(session)
    yield from _collect_recent(session)
    yield from _collect_workers(session, service)
    stored = GaugeMetricFamily("pare_stored_bytes", "Bytes that rows name, by kind of thing.", labels=["kind"])
    for table in STORED:
        total = session.scalar(select(func.coalesce(func.sum(table.size_bytes), 0)))
        stored.add_metric([table.__tablename__], float(total or 0))
    yield stored
    hints = session.scalar(select(func.count()).select_from(OutboxRow)) or 0
    yield GaugeMetricFamily("pare_hints_unsent", "Wake-up hints that the broker has not taken yet.", hints)
    query = select(func.count(), func.min(DeliveryRow.created_at), db_now()).where(DeliveryRow.state == PENDING)
    count, oldest, now = session.execute(query).one()
    yield GaugeMetricFamily("pare_webhook_messages_pending", "Messages to webhooks not delivered yet.", count)
    age = (now - oldest).total_seconds() if count else 0.0
    yield GaugeMetricFamily("pare_webhook_oldest_pending_seconds", "Age of the oldest of them.", age)


def _collect_queue(session: Session) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("pare_jobs_waiting", "Jobs that wait for a worker, checks included.", labels=["device"])
    oldest = GaugeMetricFamily("pare_oldest_waiting_seconds", "Age of the oldest of them.", labels=["device"])
    running = GaugeMetricFamily("pare_jobs_running", "Jobs that a worker holds.", labels=["device"])
    for kind in DEVICE_KINDS:
        of_kind = (JobRow.needs_device == kind, JobRow.action.not_in(MADE_OF_PARTS))
        query = select(func.count(), func.min(JobRow.created_at), db_now()).where(
            JobRow.state == State.QUEUED, *of_kind
        )
        count, first, now = session.execute(query).one()
        waiting.add_metric([kind], count)
        oldest.add_metric([kind], (now - first).total_seconds() if count else 0.0)
        held = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state.in_(OWNED), *of_kind))
        running.add_metric([kind], held or 0)
    yield from (waiting, oldest, running)


def _collect_recent(session: Session) -> Iterator[Metric]:
    newest = select(JobRow.id).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(MAX_RECENT_JOBS)
    steps = JobRow.metrics["steps"]
    query = select(JobRow.action, JobRow.state, JobRow.error, steps).where(
        JobRow.id.in_(newest), JobRow.state.in_(TERMINAL), JobRow.finished_at > db_now(-RECENT_SECONDS)
    )
    ended: dict[tuple[str, str, str], int] = defaultdict(int)
    seconds: dict[str, list[float]] = defaultdict(list)
    for action, state, error, done in session.execute(query):
        code = (error or {}).get("code", "") if state == State.FAILED else ""
        ended[action, state, code] += 1
        for step in done or ():
            seconds[step["kind"]].append(step["seconds"])
    jobs = GaugeMetricFamily(
        "pare_recent_jobs", "Jobs that ended in the last hour, by how.", labels=["action", "state", "code"]
    )
    for names, count in sorted(ended.items()):
        jobs.add_metric(list(names), count)
    total = GaugeMetricFamily("pare_recent_step_seconds", "Time that steps of these jobs took.", labels=["technique"])
    number = GaugeMetricFamily("pare_recent_steps", "How many steps that were.", labels=["technique"])
    for kind, taken in sorted(seconds.items()):
        total.add_metric([kind], sum(taken))
        number.add_metric([kind], len(taken))
    yield from (jobs, total, number)


def _collect_workers(session: Session, service: Service) -> Iterator[Metric]:
    running = count_running(session)
    workers = list_workers(session, service.settings.worker_seen_seconds)
    takers = [worker for worker in workers if accepts_jobs(worker)]
    yield GaugeMetricFamily("pare_workers", "Slots of workers seen lately.", len(workers))
    yield GaugeMetricFamily("pare_workers_accepting", "Of those, how many take jobs.", len(takers))
    yield GaugeMetricFamily("pare_workers_busy", "How many run one.", sum(1 for each in workers if running[each.id]))
    memory = GaugeMetricFamily(
        "pare_gpu_memory_bytes", "Memory of each GPU, where its driver tells.", labels=["worker", "index", "name"]
    )
    for worker in workers:
        for device in worker.facts.get("devices", []):
            if device.get("memory_bytes") is not None:
                memory.add_metric([worker.id, str(device["index"]), device["name"]], device["memory_bytes"])
    yield memory
    dispatch = read_dispatch(session, service.settings.health_seen_seconds)
    yield GaugeMetricFamily("pare_dispatchers", "Dispatchers seen lately.", dispatch.num_dispatchers)
    yield GaugeMetricFamily(
        "pare_dispatchers_reaching_broker", "Of those, how many the broker answers.", dispatch.num_reaching_broker
    )
