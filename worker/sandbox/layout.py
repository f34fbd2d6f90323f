"""What a sandboxed engine may see: the system and Python read-only, its own code, its own directory, nothing else."""

import errno
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import worker

PROJECT = Path(worker.__file__).resolve().parent.parent
# Beneath the project only what the engine imports: the data directory may lie in there too.
_CODE = ("app/__init__.py", "app/recipes", "worker/__init__.py", "worker/engine", "worker/sandbox")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_FILES = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
)

_GPU_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
"""What CUDA opens besides the GPUs' own nodes: the driver's control node and those of unified memory."""

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "USER": "engine",
    "LOGNAME": "engine",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONHASHSEED": "0",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
    "HF_HUB_OFFLINE": "1",
}


@cache
def readable_paths(extra: tuple[Path, ...] = ()) -> tuple[str, ...]:
    """Return the paths shown read-only; each exists, none is a link, none lies below another."""
    wanted = [Path(path) for path in (*_SYSTEM, *_FILES)]
    wanted += [Path(sys.base_prefix), Path(sys.prefix), *(PROJECT / part for part in _CODE), *extra]
    chosen: list[str] = []
    for path in wanted:
        real = str(path) if str(path) == "/etc/localtime" else os.path.realpath(path)
        below = any(real == other or real.startswith(f"{other}/") for other in chosen)
        if path.exists() and not below:
            chosen.append(real)
    return tuple(chosen)


@cache
def system_links() -> dict[str, str]:
    """Return the links at the top of the file system, such as /bin -> usr/bin, and those Python was started through."""
    links = {path: str(Path(path).readlink()) for path in _SYSTEM if Path(path).is_symlink()}
    for prefix in (sys.prefix, sys.base_prefix):
        if os.path.realpath(prefix) != prefix and not prefix.startswith("/usr/"):
            links[prefix] = os.path.realpath(prefix)
    return links


def find_gpus(devices: Path = Path("/dev")) -> tuple[int, ...]:
    """Return the numbers of the NVIDIA GPUs whose nodes are here: in a container only its own, under any numbers."""
    numbers = (path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*"))
    return tuple(sorted(int(number) for number in numbers if number.isdigit()))


def gpu_nodes(gpus: Sequence[int], devices: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the device nodes that an engine needs for these GPUs, by the numbers of their nodes, and no other GPU's.

    The driver's libraries are part of the system that every engine sees, /proc/driver/nvidia of every /proc. Raises
    FileNotFoundError where a node is missing: the GPU is not there, or the driver has not made it yet.
    """
    if not gpus:
        return ()
    required = [devices / f"nvidia{gpu}" for gpu in gpus] + [devices / name for name in _GPU_NODES[:2]]
    for node in required:
        if not node.exists():
            raise FileNotFoundError(errno.ENOENT, f"GPU node {node} is missing; `nvidia-modprobe -u -c 0` makes it")
    return tuple(str(node) for node in (*required, *(devices / name for name in _GPU_NODES[2:])) if node.exists())


def gpu_environment(gpus: Sequence[int], *, hidden: bool) -> dict[str, str]:
    """Return what tells CUDA which GPUs to use. Where the other nodes are hidden, it counts those it sees from 0."""
    visible = range(len(gpus)) if hidden else gpus
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, visible))}


def environment(directory_of_scratch: str, num_threads: int | None) -> dict[str, str]:
    """Return the whole environment of an engine, the GPUs aside: nothing of ours is inherited."""
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    scratch = {"HOME": directory_of_scratch, "TMPDIR": directory_of_scratch}
    return {**_ENVIRONMENT, **scratch, **threads, "PYTHONPATH": str(PROJECT)}
