"""Room for libraries that are mapped and not read."""

from pathlib import Path

import pytest

from tests.worker.conftest import Bench
from worker import addresses
from worker.engine_process import EngineFactory
from worker.sandbox.detect import detect


def test_cuda_libraries_are_counted_wherever_they_lie(tmp_path: Path) -> None:
    for name, size in {
        "torch/lib/libtorch_cpu.so": 1, "torch/lib/libtorch_cuda.so": 10, "torch/lib/libc10_cuda.so": 100,
        "nvidia/cu13/lib/libcublasLt.so.13": 1000, "nvidia/nccl/lib/libnccl.so.2": 10_000, "nvidia/README.md": 100_000,
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))

    assert addresses.sum_libraries(tmp_path / "torch") == 11_110


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_engine_has_its_memory_beside_them(bench: Bench, monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    monkeypatch.setattr("worker.engine_process.count_cuda_library_bytes", lambda: 1000)
    factory = EngineFactory(bench.settings, bench.worker, detect("auto"), bench.settings.data_dir)

    assert factory.limit(num_ranks).memory_bytes == bench.settings.engine_memory_bytes // num_ranks + 1000
