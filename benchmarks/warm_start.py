"""From claim to the engine's first line: with a warm standby engine, back to back, and without one.

    python benchmarks/warm_start.py [--jobs 15]

Real jobs: each checks an uploaded model of a small CNN, through a real database, real storage and a real sandbox.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import JobRow, ModelRow
from app.ids import new_id
from app.jobs import queue_check
from app.settings import Settings
from app.storage import Blob, open_storage, owner_storage
from worker.settings import WorkerSettings
from worker.slot import Slot, open_slot


def export_model(path: Path) -> None:
    """Write a small CNN as an upload would bring it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 64, 10),
    ).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(module, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def queue_one(database: Database, settings: Settings, blob: Blob) -> str:
    """Upload the model once more and queue its check."""
    with database.session() as session:
        model = ModelRow(
            id=new_id("mdl"),
            owner="local",
            name="cnn",
            format="pt2",
            state="checking",
            size_bytes=blob.size_bytes,
            sha256=blob.sha256,
            created_at=db_now(),
        )
        session.add(model)
        session.flush()
        return queue_check(session, settings, owner="local", model_id=model.id).id


def measure(
    slot: Slot, database: Database, settings: Settings, blob: Blob, num_jobs: int, *, wait: bool
) -> list[float]:
    """Run jobs one after the other; return the milliseconds from claim to first line of each."""
    for _ in range(num_jobs):
        _wait_until(lambda: not wait or slot.supervisor.standby.is_warm())
        job_id = queue_one(database, settings, blob)
        slot.supervisor.run(job_id)
        with database.read() as session:
            job = session.get(JobRow, job_id)
            assert job is not None
            assert job.state == "succeeded", job.error
    return [1000 * seconds for seconds in slot.supervisor.first_line_seconds[-num_jobs:]]


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=15)
    num_jobs = parser.parse_args().jobs
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory(prefix="pare-bench-") as place:
        settings = Settings(data_dir=Path(place))
        database = Database(settings.database_url)
        database.upgrade()
        export_model(Path(place) / "model.pt2")
        blob = owner_storage(open_storage(settings.storage_url), "local").put_file(Path(place) / "model.pt2")
        rows = []
        for name, standby, wait in (
            ("warm standby", True, True),
            ("warm standby, jobs back to back", True, False),
            ("no standby", False, False),
        ):
            slot = open_slot(settings, WorkerSettings(single_user=True, standby=standby))
            layers = slot.supervisor.isolation.layers
            try:
                rows.append((name, measure(slot, database, settings, blob, num_jobs, wait=wait)))
            finally:
                slot.close()
        database.dispose()
    print(f"isolation: {', '.join(layers)}; {num_jobs} jobs each; claim to first engine line, in ms\n")
    print("| start | median | p90 | min | max |\n|---|---|---|---|---|")
    for name, times in rows:
        p90 = statistics.quantiles(times, n=10)[-1]
        print(f"| {name} | {statistics.median(times):.0f} | {p90:.0f} | {min(times):.0f} | {max(times):.0f} |")


if __name__ == "__main__":
    main()
