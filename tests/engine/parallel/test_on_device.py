"""Ranks that compute on a device of their own end where ranks on the CPU do; the simulated device stands for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.recipes.parallel import Parallel
from app.recipes.training import Finetune
from tests.engine.parallel.runs import difference, run_and_follow, run_forked
from tests.engine.parallel.test_plans import SHORT, open_cnn, open_gpt
from tests.engine.simulated_autocast import autocast_as_on_cuda
from tests.engine.simulated_device import DEVICE, RemoteTensor
from worker.engine.devices import CPU, DeviceMissing, place_ranks
from worker.engine.parallel.choose import choose_strategy
from worker.engine.parallel.states import gather_state
from worker.engine.programs.placement import move_module
from worker.engine.programs.program import Program


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


OTHERWISE = {"precision": "bf16", "accumulate": 2}


@pytest.mark.parametrize(
    ("model", "plan", "more"),
    [
        ("cnn", {"data": 2}, OTHERWISE),
        ("cnn", {"data": 2, "shard": True}, {}),
        ("gpt", {"data": 2, "tensor": 2}, {}),
        ("gpt", {"pipeline": 2}, {}),
        pytest.param("gpt", {"data": 2, "shard": True}, OTHERWISE, marks=pytest.mark.long),
        pytest.param("gpt", {"tensor": 2}, OTHERWISE, marks=pytest.mark.long),
        pytest.param("gpt", {"data": 2, "pipeline": 2, "num_microbatches": 2}, {}, marks=pytest.mark.long),
        pytest.param("cnn", {"pipeline": 2, "num_microbatches": 1}, {"precision": "bf16"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_plan_on_devices(model: str, plan: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    start, examples = {"gpt": open_gpt, "cnn": open_cnn}[model]()
    spec = {**SHORT, "max_steps": 2, "parallel": plan, **more}

    made = []
    for device in (CPU, DEVICE):
        # On the CPU torch would take a kernel for attention that rounds otherwise.
        with sdpa_kernel(SDPBackend.MATH), autocast_as_on_cuda():
            outcome, _ = run_and_follow(start.copy(), examples, tmp_path / device.type, device=device, **spec)
        assert isinstance(outcome.program, Program)
        made.append(outcome.program)

    assert not [each for each in made[1].module.state_dict().values() if isinstance(each, RemoteTensor)]
    assert difference(*made) < 1e-6 < difference(start, made[1])


def test_what_ranks_bring_together_for_a_checkpoint_waits_in_main_memory(tmp_path: Path) -> None:
    program, examples = open_cnn()

    def act() -> list[bool]:
        move_module(program.module, DEVICE)
        spec = {**SHORT, "kind": "finetune", "parallel": {"data": 2, "shard": True}}
        strategy = choose_strategy(Finetune.model_validate(spec), program, program.module, examples, ())
        state = gather_state(strategy, program.module, torch.optim.SGD(program.module.parameters()))
        return [isinstance(kept["value"], RemoteTensor) for name, kept in state.items() if "buffer" not in name]

    plan = Parallel(data=2, shard=True)
    assert run_forked(plan, tmp_path / "meeting", act, DEVICE) == [False] * 10


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_ranks(CPU, 3) == [CPU] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(each) for each in place_ranks(torch.device("cuda", 0), 2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(DeviceMissing, match="3 ranks, each on a GPU of its own, and this engine sees 2"):
        place_ranks(torch.device("cuda", 0), 3)
