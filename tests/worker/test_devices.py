"""What a worker finds out about GPUs without torch, and how it divides what it has among its slots."""

import os
from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.settings import Settings
from worker.devices import (
    Gpu,
    find_driver_folders,
    find_gpus,
    list_nodes,
    parse_listing,
    parse_sets,
    read_proc,
)
from worker.settings import WorkerSettings
from worker.shares import Share, divide, find_memory_bytes

LISTING = """\
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559
0, GPU-aaaa, NVIDIA H100 80GB HBM3, [N/A]
"""
FIRST = Gpu(0, "NVIDIA H100 80GB HBM3", None, "GPU-aaaa")
SECOND = Gpu(1, "NVIDIA H100 80GB HBM3", 81559 * 2**20, "GPU-bbbb")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the driver's program, which is not on this machine: it prints what the real one prints."""
    place = tmp_path / "bin" / "nvidia-smi"
    place.parent.mkdir()
    place.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    place.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return place


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """The driver's files, in which the device nodes are numbered the other way round."""
    for bus, uuid, minor in (("0000:01:00.0", "GPU-aaaa", 1), ("0000:02:00.0", "GPU-bbbb", 0)):
        folder = tmp_path / "gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text(
            f"Model: \t\t NVIDIA H100 80GB HBM3\nGPU UUID: \t {uuid}\nBus Location: {bus}\nDevice Minor: \t {minor}\n"
        )
    return tmp_path / "gpus"


def test_the_drivers_listing_is_read_in_its_own_order() -> None:
    assert parse_listing(LISTING) == (FIRST, SECOND)
    assert parse_listing("No devices were found\n") == ()


@pytest.mark.usefixtures("program")
def test_gpus_have_the_nodes_that_the_drivers_files_tell(proc: Path) -> None:
    assert [gpu.node for gpu in find_gpus(proc)] == ["/dev/nvidia1", "/dev/nvidia0"]
    assert [gpu.memory_bytes for gpu in find_gpus(proc)] == [None, 81559 * 2**20]
    assert [gpu.visible_as for gpu in find_gpus(proc)] == ["GPU-aaaa", "GPU-bbbb"]


@pytest.mark.parametrize("script", ["exit 9", "echo 'Failed to initialize NVML'", None])
def test_the_files_alone_will_do_where_the_program_does_not_work(program: Path, proc: Path, script: str | None) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n") if script else program.write_text("not a program")
    assert find_gpus(proc) == read_proc(proc)
    assert [gpu.uuid for gpu in find_gpus(proc)] == ["GPU-aaaa", "GPU-bbbb"]


def test_a_machine_without_a_driver_has_no_gpus(program: Path, tmp_path: Path) -> None:
    program.unlink()
    assert find_gpus(tmp_path / "nothing") == ()
    assert list_nodes(()) == []


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(
    ("visible", "indexes"), [("1", [1]), ("GPU-aaaa", [0]), ("GPU-b", [1]), ("0,1", [0, 1]), ("", []), ("7", [])]
)
def test_a_worker_keeps_to_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, indexes: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in find_gpus(tmp_path / "nothing")] == indexes


def test_the_drivers_libraries_are_looked_for_where_nobody_told_the_linker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, usual, other = (tmp_path / name for name in ("told", "usual/lib64", "other"))
    for folder in (told, usual, other):
        folder.mkdir(parents=True)
    for folder in (told, usual):
        (folder / "libcuda.so.1").touch()
    monkeypatch.setattr("worker.devices.find_library", lambda _: None)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{other}::{told}")
    assert find_driver_folders([str(tmp_path / "usual")]) == (told,)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert find_driver_folders([str(tmp_path / "usual")]) == (usual,)
    monkeypatch.setattr("worker.devices.find_library", lambda _: "libcuda.so.1")
    assert find_driver_folders([str(tmp_path / "usual")]) == ()


def test_the_drivers_program_makes_the_node_that_is_missing(program: Path, proc: Path, tmp_path: Path) -> None:
    node = tmp_path / "nvidia-uvm"
    find_gpus(proc, node)
    maker = program.with_name("nvidia-modprobe")
    maker.write_text(f'#!/bin/sh\necho "$@" >> {node}\n')
    maker.chmod(0o755)
    find_gpus(proc, node)
    find_gpus(proc, node)
    assert node.read_text() == "-c 0 -u\n"


def test_declared_sets_take_their_facts_from_the_driver() -> None:
    assert parse_sets("0,1", (FIRST, SECOND)) == [(FIRST, SECOND)]
    assert parse_sets("1;5", (FIRST, SECOND)) == [(SECOND,), (Gpu(5),)]


@pytest.mark.parametrize("text", ["0,,1", "zero", "0;", "0,1;1,2", "-1"])
def test_a_declaration_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="PARE_WORKER_DEVICES"):
        parse_sets(text, ())


def share_out(settings: Settings, **worker: object) -> tuple[Share, ...]:
    return divide(settings, WorkerSettings(**worker))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "concurrency", "sets"),
    [
        ("cpu", None, [()]),
        ("cpu", 3, [(), (), ()]),
        ("0,1,2,3", None, [(0,), (1,), (2,), (3,)]),
        ("0,1,2,3", 2, [(0, 1), (2, 3)]),
        ("0,1,2,3", 1, [(0, 1, 2, 3)]),
        ("0;1,2", None, [(0,), (1, 2)]),
        ("0;1,2", 2, [(0,), (1, 2)]),
    ],
)
def test_each_slot_owns_devices_of_its_own(
    settings: Settings, devices: str, concurrency: int | None, sets: list[tuple[int, ...]]
) -> None:
    shares = share_out(settings, devices=devices, concurrency=concurrency)
    assert [tuple(gpu.index for gpu in share.gpus) for share in shares] == sets
    assert [(share.slot, share.num_slots) for share in shares] == [(slot, len(sets)) for slot in range(len(sets))]


@pytest.mark.parametrize(("devices", "concurrency"), [("0,1,2", 2), ("0,1", 3), ("0;1", 3)])
def test_slots_that_devices_cannot_fill_are_refused(settings: Settings, devices: str, concurrency: int) -> None:
    with pytest.raises(ConfigurationError, match="PARE_WORKER_CONCURRENCY"):
        share_out(settings, devices=devices, concurrency=concurrency)


def test_a_worker_with_gpus_takes_cpu_jobs_only_when_told(settings: Settings) -> None:
    assert share_out(settings, devices="0")[0].accepts == ("gpu",)
    assert share_out(settings, devices="0", takes_cpu_jobs=True)[0].accepts == ("gpu", "cpu")
    assert share_out(settings, devices="cpu", takes_cpu_jobs=True)[0].accepts == ("cpu",)


def test_declared_memory_and_threads_are_divided_and_hold_for_engines(settings: Settings) -> None:
    first, second = share_out(settings, devices="cpu", concurrency=2, memory_bytes=6 * 2**30, threads=5)
    assert (first.memory_bytes, first.num_threads) == (second.memory_bytes, second.num_threads) == (3 * 2**30, 2)
    limited = first.limit(settings)
    assert (limited.engine_memory_bytes, limited.engine_threads) == (3 * 2**30, 2)


def test_undeclared_memory_is_what_an_engine_may_take_and_the_machine_has(settings: Settings) -> None:
    small = settings.model_copy(update={"engine_memory_bytes": 256 * 2**20, "engine_threads": 3})
    (share,) = share_out(small, devices="cpu")
    assert (share.memory_bytes, share.num_threads) == (256 * 2**20, 3)
    large = settings.model_copy(update={"engine_memory_bytes": 2**50})
    (share,) = share_out(large, devices="cpu")
    assert share.memory_bytes == find_memory_bytes()
    assert share.limit(large).engine_memory_bytes == 2**50
