"""Choosing a device, moving programs to it and back, and what is refused without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.recipes.recipe import KINDS
from tests.engine.simulated_device import DEVICE, RemoteTensor, simulated_device
from tests.engine.techniques.learning import context, open_pruned_cnn
from tests.engine.techniques.opening import open_module
from worker.engine.devices import CPU, DeviceMissing, choose_device, describe_device, device_of, read_driver_version
from worker.engine.failures import translate_failure
from worker.engine.programs.capture import capture
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program
from worker.engine.techniques.registry import TECHNIQUES


class Positions(nn.Module):
    """Makes a constant inside its graph, and shares one table between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        logits: torch.Tensor = self.head(self.norm(x + self.embed(places).sum(0)))
        return logits


@pytest.fixture
def program(tmp_path: Path) -> Program:
    torch.manual_seed(0)
    return open_module(Positions(), (torch.randn(2, 8),), tmp_path).copy()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_absent_is_an_error_with_the_cause_and_the_fix() -> None:
    assert choose_device("cpu") == CPU
    with pytest.raises(DeviceMissing) as caught:
        choose_device("cuda")
    error = translate_failure(caught.value, "open_model")
    assert error.code == "device_missing"
    assert "CUDA_VISIBLE_DEVICES" in error.detail
    assert "target.device" in error.fix


def test_a_program_works_on_its_device_and_comes_back_as_it_was(program: Program) -> None:
    x = torch.randn(3, 8)
    program.module.eval()
    program.masks["head.weight"] = torch.ones(8, 8, dtype=torch.bool)
    with torch.no_grad():
        (expected,) = program.module(x)
    parameters = dict(program.module.named_parameters())
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    program.device = DEVICE
    with simulated_device(), torch.no_grad():
        with on_device(program) as device:
            assert device == device_of(program.module) == DEVICE
            assert isinstance(program.masks["head.weight"], RemoteTensor)
            (found,) = program.module(x.to(device))
            assert torch.equal(found.cpu(), expected)
        assert device_of(program.module) == CPU
    assert all(value is parameters[name] for name, value in program.module.named_parameters())
    assert program.module.get_parameter("head.weight") is program.module.get_parameter("embed.weight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.module.state_dict().items())
    assert not isinstance(program.masks["head.weight"], RemoteTensor)
    assert torch.equal(program.module(x)[0], expected)
    capture(program)


def test_a_program_comes_back_after_a_failure(program: Program) -> None:
    program.device = DEVICE
    with simulated_device(), pytest.raises(RuntimeError, match="same device"), on_device(program):
        program.module(torch.randn(3, 8))
    assert device_of(program.module) == CPU


@pytest.mark.parametrize("kind", ["train", "quantize_aware_training", "prune_wanda"])
def test_memory_that_runs_out_within_a_step_is_called_that(kind: str, tmp_path: Path) -> None:
    program, examples = open_pruned_cnn(tmp_path)
    program.device = DEVICE
    more: dict[str, Any] = {"sparsity": 0.5} if kind == "prune_wanda" else {"max_steps": 2}
    step = KINDS[kind].model_validate({"kind": kind, **more})
    with simulated_device() as simulated:
        simulated.room = 30
        with pytest.raises(torch.OutOfMemoryError) as caught:
            TECHNIQUES[kind].run(program, step, context(examples))
    assert device_of(program.module) == CPU
    assert translate_failure(caught.value, kind).code == "out_of_memory"


def test_parameters_are_not_moved_where_they_would_be_lost_for_training(program: Program) -> None:
    with torch.inference_mode(), pytest.raises(AssertionError, match="never be trained"), on_device(program):
        pass


def test_the_driver_is_named_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert read_driver_version(path) is None
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12\n")
    assert read_driver_version(path) == "550.54.15"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert read_driver_version(path) == "580.65.06"


def test_the_cpu_is_not_described_as_a_gpu() -> None:
    assert describe_device(CPU) is None
