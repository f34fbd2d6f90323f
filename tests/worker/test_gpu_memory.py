"""A GPU after a job that was killed on it. Needs one."""

import os
import signal
import subprocess
import sys

import pytest

from app.jobs import JobNeeds
from tests.worker.conftest import ENGINES, Bench, wait_until
from tests.worker.test_supervisor import Slots, run_in_thread

BLOCK_BYTES, BLOCKS = 256 * 2**20, 8
NOISE_BYTES = 64 * 2**20
"""What the driver itself may have more of than before."""


def used_bytes() -> int:
    """Return the used memory of the first GPU, of all processes."""
    command = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[0]) * 2**20


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_job_killed_while_it_allocates_leaves_the_gpu_empty(bench: Bench, open_slots: Slots) -> None:
    command = (sys.executable, str(ENGINES / "scripted.py"), "{job}", bench.marker)
    slot = open_slots(bench, engine_command=command, standby=False)
    before = used_bytes()
    fill: list[object] = ["fill_gpu", BLOCK_BYTES, BLOCKS]
    job_id = bench.queue(fill, ["say", "full"], ["sleep", 600], needs=JobNeeds("gpu", 1), attempts=1)
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: used_bytes() > before + 2 * BLOCK_BYTES, what="two blocks on the GPU")

    for pid in bench.processes():
        os.kill(pid, signal.SIGKILL)
    thread.join(60)

    job = bench.read(job_id)
    assert (job.state, job.error and job.error["code"]) == ("failed", "engine_killed")
    wait_until(lambda: used_bytes() <= before + NOISE_BYTES, 30, "the GPU's memory as before")
    again = bench.queue(fill, ["finish"], needs=JobNeeds("gpu", 1))
    assert slot.supervisor.run(again)
    assert bench.read(again).state == "succeeded", "the device is free"
