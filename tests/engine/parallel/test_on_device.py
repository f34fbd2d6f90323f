"""Ranks that compute on a device of their own end where ranks on the CPU do; the simulated device stands for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.engine.parallel.runs import difference, run_and_follow
from tests.engine.parallel.test_plans import SHORT, open_cnn, open_gpt
from tests.engine.simulated_device import DEVICE, RemoteTensor
from worker.engine.devices import CPU, DeviceMissing, place_ranks
from worker.engine.programs.program import Program


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("cnn", {"data": 2}),
        ("gpt", {"data": 2, "tensor": 2}),
        ("gpt", {"pipeline": 2}),
    ],
    ids=str,
)
def test_a_plan_on_devices(model: str, plan: dict[str, Any], tmp_path: Path) -> None:
    start, examples = {"gpt": open_gpt, "cnn": open_cnn}[model]()
    spec = {**SHORT, "max_steps": 2, "parallel": plan}

    made = []
    for device in (CPU, DEVICE):
        # On the CPU torch would take a kernel for attention that rounds otherwise.
        with sdpa_kernel(SDPBackend.MATH):
            outcome, _ = run_and_follow(start.copy(), examples, tmp_path / device.type, device=device, **spec)
        assert isinstance(outcome.program, Program)
        made.append(outcome.program)

    assert not [each for each in made[1].module.state_dict().values() if isinstance(each, RemoteTensor)]
    assert difference(*made) < 1e-6 < difference(start, made[1])


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_ranks(CPU, 3) == [CPU] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(each) for each in place_ranks(torch.device("cuda", 0), 2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(DeviceMissing, match="3 ranks, each on a GPU of its own, and this engine sees 2"):
        place_ranks(torch.device("cuda", 0), 3)
