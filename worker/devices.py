"""The GPUs of this machine, found without torch: what the driver's own program and its files say.

A process sees a GPU when CUDA_VISIBLE_DEVICES names it and its device node can be opened; `Gpu` knows both.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from ctypes.util import find_library
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from app.errors import ConfigurationError

_PROGRAM = "nvidia-smi"
_QUESTION = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_PROGRAM_SECONDS = 15.0
"""A driver that was asleep takes seconds to answer."""
_PROC = Path("/proc/driver/nvidia/gpus")
_SHARED_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "dxg")
"""The last is that of Windows (WSL 2), where it is the only one."""
_UVM = Path("/dev/nvidia-uvm")
_LIBRARY = "libcuda.so.1"
_FOLDERS = ("/usr/local/nvidia", "/usr/lib/wsl", "/run/opengl-driver")
"""Where drivers are mounted without the linker or PATH being told: clusters, Windows, NixOS."""
_MIB = 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int
    """In the driver's order, by PCI bus."""
    name: str = "declared"
    memory_bytes: int | None = None
    uuid: str | None = None
    minor: int | None = None
    """The number of its device node; the same as its index where nobody says otherwise."""

    @property
    def visible_as(self) -> str:
        """Its name in CUDA_VISIBLE_DEVICES."""
        return self.uuid or str(self.index)

    @property
    def node(self) -> str:
        """Its device node."""
        return f"/dev/nvidia{self.index if self.minor is None else self.minor}"


def list_nodes(gpus: Iterable[Gpu]) -> list[str]:
    """Return the device nodes that a process needs for these GPUs, those of the driver itself included."""
    own = [gpu.node for gpu in gpus]
    return [path for path in (*own, *(f"/dev/{name}" for name in _SHARED_NODES if own)) if os.path.exists(path)]  # noqa: PTH110


def find_driver_folders(usual: Iterable[str] = _FOLDERS) -> tuple[Path, ...]:
    """Return the folders of the driver's libraries that a process finds only if it is told: those of LD_LIBRARY_PATH,
    else the usual ones, where the linker knows none."""
    told = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if found := _with_driver(told):
        return found
    if find_library("cuda") is not None:
        return ()
    return _with_driver(Path(folder) / name for folder in usual for name in ("lib64", "lib"))


def _with_driver(folders: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(folder.resolve() for folder in folders if (folder / _LIBRARY).exists())


def make_memory_node(node: Path) -> None:
    """Have the driver's own program make the node of unified memory, which CUDA cannot do without: the first CUDA
    program after a boot has it made, and an engine in its sandbox may not."""
    program = shutil.which("nvidia-modprobe")
    if node.exists() or program is None:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [program, "-c", "0", "-u"], capture_output=True, timeout=_PROGRAM_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip


def find_gpus(proc: Path = _PROC, memory_node: Path = _UVM) -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use, in the driver's order; none where there is no driver."""
    from_files = read_proc(proc)
    found = parse_listing(_ask_driver()) or from_files
    minors = {gpu.uuid: gpu.minor for gpu in from_files}
    gpus = tuple(replace(gpu, minor=minors.get(gpu.uuid)) for gpu in found)
    if gpus:
        make_memory_node(memory_node)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    # Whoever started the worker gave it these: a cluster's scheduler does so.
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(gpu for gpu in gpus if str(gpu.index) in names or any(_names(name, gpu) for name in names))


def parse_sets(text: str, found: tuple[Gpu, ...]) -> list[tuple[Gpu, ...]]:
    """Return the sets that a setting declares: "0,1;2,3" is two sets of two GPUs; raises ConfigurationError.

    A GPU that the driver does not list is taken at the operator's word.
    """
    known = {gpu.index: gpu for gpu in found}
    sets: list[tuple[Gpu, ...]] = []
    for part in text.split(";"):
        names = [name.strip() for name in part.split(",")]
        if not all(name.isdecimal() for name in names):
            raise ConfigurationError(
                f"PARE_WORKER_DEVICES is {text!r}",
                fix="Write auto, cpu, the indexes of GPUs such as 0,1,2,3 or sets of them such as 0,1;2,3.",
            )
        sets.append(tuple(known.get(int(name), Gpu(int(name))) for name in names))
    indexes = [gpu.index for gpus in sets for gpu in gpus]
    twice = sorted({index for index in indexes if indexes.count(index) > 1})
    if twice:
        raise ConfigurationError(
            f"PARE_WORKER_DEVICES {text!r} names GPU {twice[0]} more than once",
            fix="Name each GPU once: a GPU runs one job at a time.",
        )
    return sets


def parse_listing(text: str) -> tuple[Gpu, ...]:
    """Read the driver's program's lines: index, UUID, name, memory in MiB."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0].isdecimal():
            memory = int(fields[3]) * _MIB if fields[3].isdecimal() else None
            gpus.append(Gpu(int(fields[0]), fields[2], memory, fields[1]))
    return tuple(sorted(gpus, key=lambda gpu: gpu.index))


def read_proc(proc: Path) -> tuple[Gpu, ...]:
    """Read the driver's files, one folder for each GPU; they do not tell the memory."""
    if not proc.is_dir():
        return ()
    gpus = []
    for index, folder in enumerate(sorted(proc.iterdir())):
        try:
            lines = (folder / "information").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        minor = facts.get("Device Minor", "")
        gpus.append(
            Gpu(
                index,
                facts.get("Model", "NVIDIA GPU"),
                None,
                facts.get("GPU UUID"),
                int(minor) if minor.isdecimal() else None,
            )
        )
    return tuple(gpus)


def _ask_driver() -> str:
    elsewhere = [f"{folder}/{name}" for folder in _FOLDERS for name in ("bin", "lib")]
    program = shutil.which(_PROGRAM, path=":".join([os.environ.get("PATH", os.defpath), *elsewhere]))
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *_QUESTION],
            capture_output=True,
            text=True,
            timeout=_PROGRAM_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("nvidia-smi does not answer", error=str(error)[:300])
        return ""
    if done.returncode != 0:
        _log.warning("nvidia-smi failed", status=done.returncode, output=(done.stdout + done.stderr).strip()[:300])
        return ""
    return done.stdout


def _names(name: str, gpu: Gpu) -> bool:
    """Whether a word of CUDA_VISIBLE_DEVICES is the beginning of a GPU's UUID, as CUDA allows."""
    return gpu.uuid is not None and name.startswith("GPU-") and gpu.uuid.startswith(name)
