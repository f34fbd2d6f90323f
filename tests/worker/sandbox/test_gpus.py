"""An engine sees the GPUs of its slot and no other, and CUDA is told so."""

import shutil
from pathlib import Path

import pytest

from worker.sandbox import bubblewrap
from worker.sandbox.isolation import Isolation, Limits
from worker.sandbox.launch import _landlock
from worker.sandbox.layout import find_gpus, gpu_environment, gpu_nodes

ISOLATION = Isolation("bubblewrap", own_user=True, user_namespace=False, landlock=True, seccomp=True, linux=True)


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / name).touch()
    return tmp_path


def test_the_nodes_are_those_of_the_slot_and_what_cuda_needs_besides(devices: Path) -> None:
    names = [Path(node).name for node in gpu_nodes([2, 0], devices)]
    assert names == ["nvidia2", "nvidia0", "nvidiactl", "nvidia-uvm"]
    (devices / "nvidia-uvm-tools").touch()
    assert "nvidia-uvm-tools" in [Path(node).name for node in gpu_nodes([1], devices)]


def test_gpus_are_found_by_the_numbers_of_their_nodes(devices: Path) -> None:
    (devices / "nvidia0").unlink()
    (devices / "nvidia10").touch()
    assert find_gpus(devices) == (1, 2, 10)


def test_a_slot_without_gpus_needs_no_node_even_where_there_is_no_driver(tmp_path: Path) -> None:
    assert gpu_nodes([], tmp_path) == ()


@pytest.mark.parametrize("missing", ["nvidia1", "nvidia-uvm", "nvidiactl"])
def test_a_missing_node_is_an_error_that_names_it(devices: Path, missing: str) -> None:
    (devices / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        gpu_nodes([1], devices)


@pytest.mark.parametrize(
    ("gpus", "hidden", "visible"), [([], True, ""), ([], False, ""), ([3, 1], True, "0,1"), ([3, 1], False, "3,1")]
)
def test_cuda_counts_from_zero_where_the_other_gpus_are_hidden(gpus: list[int], hidden: bool, visible: str) -> None:
    assert gpu_environment(gpus, hidden=hidden)["CUDA_VISIBLE_DEVICES"] == visible


def test_landlock_lets_the_engine_use_the_nodes(devices: Path) -> None:
    nodes = gpu_nodes([1], devices)
    assert set(nodes) <= set(_landlock([], "/job", ISOLATION, nodes)["write"])


def test_the_address_space_is_limited_only_without_a_gpu() -> None:
    limits = Limits(memory_bytes=2**30, file_bytes=1)
    assert limits.as_rlimits(ISOLATION)["AS"] == 2**30
    assert "AS" not in limits.as_rlimits(ISOLATION, gpu=True)


def test_bubblewrap_binds_the_nodes_after_it_made_dev_and_before_dev_is_closed(
    devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    nodes = gpu_nodes([1], devices)
    line = bubblewrap.wrap(ISOLATION, "/work/job", (), nodes)
    for node in nodes:
        place = line.index(node)
        assert line[place - 1 : place + 2] == ["--dev-bind", node, node]
        assert line.index("--dev") < place < line.index("--remount-ro")
    assert str(devices / "nvidia0") not in line
