"""The disk under the job's directory fills up: the job fails by that name, what it wrote goes, the worker goes on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.jobs import list_workers
from app.jobs.workers import find_disk_problem
from tests.worker.conftest import Bench, wait_until
from worker.slot import Slot

Slots = Callable[..., Slot]


@pytest.fixture
def small_work(bench: Bench) -> Iterator[Path]:
    """Five megabytes for the directories of all jobs."""
    work = bench.settings.data_dir / "work"
    work.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m,mode=0700", "tmpfs", str(work)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield work
    subprocess.run(["umount", "--lazy", work], check=True)


def count_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "acts",
    [
        pytest.param([["write_bytes", "out/big", 8 * 2**20], ["finish"]], id="what the engine writes"),
        pytest.param([["say", "x" * 6_000_000], ["finish"]], id="what the engine is given"),
    ],
)
def test_a_job_that_fills_the_disk_is_storage_full(
    bench: Bench, small_work: Path, open_slots: Slots, acts: list[list[object]]
) -> None:
    slot = open_slots(bench)
    job_id = bench.queue(*acts, attempts=1)
    slot.supervisor.run(job_id)
    job = bench.read(job_id)
    assert (job.state, job.error and job.error["code"]) == ("failed", "storage_full")
    assert job.error
    assert job.error["retryable"] is True

    slot.supervisor.run(healthy := bench.queue(["finish"]))
    assert bench.read(healthy).state == "succeeded"
    assert count_bytes(small_work) < 100_000


def test_a_worker_whose_disk_is_full_leaves_jobs_to_others_until_it_has_space(
    bench: Bench, small_work: Path, open_slots: Slots
) -> None:
    slot = open_slots(bench, standby=False)
    job_id = bench.queue(["finish"])

    def find_problem() -> str | None:
        with bench.database.read() as session:
            (worker,) = list_workers(session, 60)
            return find_disk_problem(worker)

    (small_work / "fill").write_bytes(bytes(4 * 2**20 + 2**19))
    assert not slot.supervisor.run(job_id)
    assert (bench.read(job_id).state, bench.read(job_id).attempt) == ("queued", 0), "no attempt was wasted"
    wait_until(lambda: "MiB left" in (find_problem() or ""), what="the worker to say so")

    (small_work / "fill").unlink()
    assert slot.supervisor.run(job_id)
    assert bench.read(job_id).state == "succeeded"
    wait_until(lambda: find_problem() is None, what="the worker to take it back")
