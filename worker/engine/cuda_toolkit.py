"""What AOTInductor's C++ for GPUs is compiled and linked with: CUDA's headers, and the library of the driver.

torch's own packages bring neither whole: the headers lack those of two packages more, and the driver has its library
wherever it was mounted, under a name that the linker does not look for.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PACKAGES = "nvidia-cuda-cccl and nvidia-cuda-crt"
"""What completes the headers beside torch, in the version of its CUDA."""
_MAPS = Path("/proc/self/maps")


def find_cuda_home() -> Path | None:
    """Return a folder with all headers: the CUDA toolkit that torch finds, else NVIDIA's packages beside torch."""
    from torch.utils import cpp_extension  # imports setuptools, and asks the driver for GPUs

    major = str(torch.version.cuda).partition(".")[0]
    beside = Path(torch.__file__).parent.parent / "nvidia" / f"cu{major}"
    homes = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    return next((home for home in (*homes, beside) if _is_complete(home / "include")), None)


def _is_complete(include: Path) -> bool:
    targets = (include / "nv" / "target", include / "cccl" / "nv" / "target")
    needed = (include / "cuda.h", include / "crt" / "host_defines.h")
    return all(path.exists() for path in needed) and any(path.exists() for path in targets)


def find_driver_library(maps: Path = _MAPS) -> Path | None:
    """Return the file of the driver's library that this process has loaded; None before CUDA is in use."""
    if not maps.exists():
        return None
    paths = (line.split()[-1] for line in maps.read_text(encoding="utf-8", errors="replace").splitlines() if line)
    return next((Path(path) for path in paths if path.rpartition("/")[2].startswith("libcuda.so")), None)


@contextmanager
def cuda_toolkit(driver: Path | None = None) -> Iterator[None]:
    """Let torch, the compiler and the linker find both. `driver` is the library's file, by default the loaded one."""
    from torch.utils import cpp_extension

    home, driver = find_cuda_home(), driver or find_driver_library()
    assert home is not None, "check_cuda_headers comes first"
    with tempfile.TemporaryDirectory() as folder:
        if driver is not None:
            (Path(folder) / "libcuda.so").symlink_to(driver)
        # GCC's own variables: looked at after what the command line says.
        variables = {"CPATH": str(home / "include" / "cccl"), "LIBRARY_PATH": folder}
        before, home_before = {name: os.environ.get(name) for name in variables}, cpp_extension.CUDA_HOME
        try:
            os.environ |= variables
            cpp_extension.CUDA_HOME = str(home)
            yield
        finally:
            cpp_extension.CUDA_HOME = home_before
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value
