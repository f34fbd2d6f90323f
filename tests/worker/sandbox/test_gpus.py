"""What a sandbox shows of GPUs: their nodes, the driver's libraries, memory that ranks share."""

import ctypes.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.worker.sandbox.test_sandbox import LIMITS, isolation, job
from worker.sandbox.isolation import Isolation
from worker.sandbox.launch import start

__all__ = ["isolation", "job"]


def test_only_the_device_nodes_it_was_given_can_be_opened(isolation: Isolation, job: Path) -> None:
    """A stand-in for GPUs: two device nodes that no sandbox shows by itself."""
    nodes = [path for path in ("/dev/fuse", "/dev/kmsg", "/dev/ptmx", "/dev/net/tun") if Path(path).is_char_device()]
    if len(nodes) < 2:
        pytest.skip("this machine has no two device nodes to spare")
    given, other = nodes[:2]
    code = (
        "import os, json, stat\n"
        f"given, other = {given!r}, {other!r}\n"
        "print(json.dumps({'kind': stat.S_ISCHR(os.stat(given).st_mode), 'other': os.path.exists(other),"
        "'number': os.stat(given).st_rdev, 'visible': os.environ['CUDA_VISIBLE_DEVICES']}))"
    )
    command = [sys.executable, "-S", "-c", code]
    sandbox = start(isolation, job, command, LIMITS, visible_devices=["GPU-a", "1"], device_nodes=[given])
    output, errors = sandbox.process.communicate(timeout=60)
    sandbox.kill(isolation.isolates)
    assert json.loads(output or b"null") == {
        "kind": True,
        "other": False,
        "number": Path(given).stat().st_rdev,
        "visible": "GPU-a,1",
    }, errors


def test_an_engine_loads_the_drivers_library_from_the_folder_it_was_given(isolation: Isolation, job: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, through which the engine's user may not pass
        Path(folder).chmod(0o755)
        library = ctypes.util.find_library("m")
        assert library is not None
        found = next(
            path for path in map(Path, ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib")) if (path / library).exists()
        )
        shutil.copy(found / library, Path(folder) / "libcuda.so.1")
        code = "import ctypes; print(ctypes.CDLL('libcuda.so.1').cos is not None)"
        sandbox = start(
            isolation, job, [sys.executable, "-S", "-c", code], LIMITS, extra_readable=[Path(folder)],
            library_folders=[Path(folder)],
        )  # fmt: skip
        output, errors = sandbox.process.communicate(timeout=60)
        sandbox.kill(isolation.isolates)
    assert output.strip() == b"True", errors


@pytest.mark.parametrize("ranks_on_gpus", [False, True])
def test_what_ranks_on_gpus_share_lies_in_memory(isolation: Isolation, job: Path, ranks_on_gpus: bool) -> None:
    code = (
        "import os, pathlib; pathlib.Path('/dev/shm/nccl').write_bytes(b'x'); "
        "print(os.stat('/dev/shm/nccl').st_dev != os.stat('/tmp').st_dev)"
    )
    nodes = ["/dev/full"] if ranks_on_gpus else []  # any node stands for a GPU's
    sandbox = start(isolation, job, [sys.executable, "-S", "-c", code], LIMITS, device_nodes=nodes, loopback=True)
    output, errors = sandbox.process.communicate(timeout=60)
    sandbox.kill(isolation.isolates)
    assert output.strip() == str(ranks_on_gpus).encode(), errors
