"""Finding CUDA's headers and the driver's library, and showing them to compiler and linker for a while."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from app.recipes.recipe import Target
from worker.engine.compilers import CompilerMissing, check_cuda_headers
from worker.engine.cuda_toolkit import cuda_toolkit, find_cuda_home, find_driver_library
from worker.engine.programs import export_aoti


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit of release 13, as far as it is looked at."""
    for name in ("cuda.h", "crt/host_defines.h", "cccl/nv/target"):
        path = tmp_path / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "elsewhere" / "torch" / "__init__.py"))
    return tmp_path


def test_headers_count_where_all_are_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cuda_home() == home
    (home / "include" / "crt" / "host_defines.h").unlink()
    assert find_cuda_home() is None
    with pytest.raises(CompilerMissing, match="has not all of CUDA's headers") as caught:
        check_cuda_headers("target.runtime is 'aotinductor'", "set it to 'torch'")
    assert "nvidia-cuda-cccl" in caught.value.fix
    monkeypatch.setattr(export_aoti, "check_compiler", lambda *_: None)
    with pytest.raises(CompilerMissing):
        export_aoti.check_aoti(Target(device="cuda", runtime="aotinductor"))
    export_aoti.check_aoti(Target(runtime="aotinductor"))


def test_packages_beside_torch_stand_in_for_a_toolkit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    place = home / "elsewhere" / "nvidia" / "cu13"
    place.mkdir(parents=True)
    (home / "include").rename(place / "include")
    assert find_cuda_home() == place


def test_the_compiler_finds_headers_and_driver_for_a_while(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    maps = home / "maps"
    driver = home / "libcuda.so.580.65.06"
    driver.touch()
    maps.write_text(f"7f0-7f1 r--p 00000000 08:01 1 /usr/lib/libc.so.6\n\n7f2-7f3 r--p 0 08:01 2 {driver}\n")
    assert find_driver_library(maps) == driver
    with cuda_toolkit(driver):
        assert (Path(os.environ["LIBRARY_PATH"]) / "libcuda.so").resolve() == driver
        assert os.environ["CPATH"] == str(home / "include" / "cccl")
        assert str(home / "include") in cpp_extension.include_paths("cuda")
    assert "LIBRARY_PATH" not in os.environ
