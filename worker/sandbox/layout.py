"""What a sandboxed engine may see: the system and Python read-only, its own code, its own directory, nothing else."""

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


def environment(
    directory_of_scratch: str,
    num_threads: int | None,
    visible_devices: Sequence[str] = (),
    library_folders: Sequence[Path] = (),
) -> dict[str, str]:
    """Return the whole environment of an engine: nothing of ours is inherited, and CUDA shows it no other GPUs."""
    devices = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(visible_devices)}
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    libraries = {"LD_LIBRARY_PATH": ":".join(map(str, library_folders))} if library_folders else {}
    scratch = {"HOME": directory_of_scratch, "TMPDIR": directory_of_scratch}
    return {**_ENVIRONMENT, **scratch, **threads, **devices, **libraries, "PYTHONPATH": str(PROJECT)}
