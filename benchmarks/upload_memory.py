"""Does a large upload raise the memory of the API process? Run: python -m benchmarks.upload_memory --mebibytes 1024."""

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2

CHUNK_BYTES = 1024 * 1024
MAX_GROWTH_MIB = 64
MAX_IDLE_MIB = 120
READY_SECONDS = 60


def main() -> int:
    """Start the real API process, upload, print what its memory did; exit 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--directory", type=Path, default=None, help="where the files go for the time of the run")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="pare-upload-", dir=arguments.directory))
    environment = {**os.environ, "PARE_DATA_DIR": str(directory), "PARE_PORT": str(find_free_port())}
    try:
        subprocess.run([sys.executable, "-m", "app.db"], env=environment, check=True)
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "app"], env=environment, stderr=log)
        try:
            return measure(process.pid, f"http://127.0.0.1:{environment['PARE_PORT']}", arguments.mebibytes)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    finally:
        shutil.rmtree(directory)


def measure(pid: int, url: str, mebibytes: int) -> int:
    """Upload and print."""
    with httpx2.Client(base_url=url, timeout=300, trust_env=False) as client:
        wait_until_ready(client)
        idle, peak_before = read_memory(pid, "VmRSS"), read_memory(pid, "VmHWM")
        digest = hashlib.sha256()
        started = time.perf_counter()
        answer = client.post("/v1/models", content=make_chunks(mebibytes, digest.update))
        seconds = time.perf_counter() - started
        upload = answer.raise_for_status().json()
        peak_after = read_memory(pid, "VmHWM")
    assert upload["size_bytes"] == mebibytes * CHUNK_BYTES, upload
    assert upload["sha256"] == digest.hexdigest(), upload
    growth = peak_after - peak_before
    print(f"uploaded {mebibytes} MiB in {seconds:.1f} s ({mebibytes / seconds:.0f} MiB/s), digest equal")
    print(f"API process, resident while idle:      {idle:7.1f} MiB (limit {MAX_IDLE_MIB})")
    print(f"API process, peak before the upload:   {peak_before:7.1f} MiB")
    print(f"API process, peak after the upload:    {peak_after:7.1f} MiB")
    print(f"growth of the peak by the upload:      {growth:7.1f} MiB (limit {MAX_GROWTH_MIB})")
    return 0 if growth <= MAX_GROWTH_MIB and idle <= MAX_IDLE_MIB else 1


def make_chunks(mebibytes: int, note: Callable[[bytes], None]) -> Iterator[bytes]:
    """Yield random-looking megabytes; each differs from the others."""
    noise = os.urandom(CHUNK_BYTES - 8)
    for index in range(mebibytes):
        chunk = index.to_bytes(8, "big") + noise
        note(chunk)
        yield chunk


def read_memory(pid: int, field: str) -> float:
    """Return a field of /proc/PID/status in MiB: VmRSS now, VmHWM at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"{field} is not in the status of process {pid}")


def find_free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(client: httpx2.Client) -> None:
    """Wait for the first healthy answer, then let start-up settle."""
    end = time.monotonic() + READY_SECONDS
    while True:
        try:
            if client.get("/health/ready").status_code == 200:
                break
        except httpx2.TransportError:
            assert time.monotonic() < end, "the API does not answer"
        time.sleep(0.1)
    time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main())
