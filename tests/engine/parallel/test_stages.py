"""Pipeline stages: cut where the dearest is cheapest, and together the module; shares: what each rank really holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from app.recipes.parallel import Parallel
from app.recipes.training import Finetune
from tests.engine.parallel.runs import run_forked
from tests.engine.parallel.test_plans import open_gpt
from worker.engine.parallel.choose import choose_strategy
from worker.engine.parallel.stages import choose_cuts, cut, parameters_of


class Chain(nn.Module):
    """Six layers in a row; the last sees the input again, and something made of it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.cos(x)
        y = x
        for layer in self.layers:
            y = torch.relu(layer(y) + shift)
        return y * x


@pytest.mark.parametrize(
    ("seconds", "num_stages", "expected"),
    [
        ((1, 1, 1, 1, 1, 1), 2, (3, 3)),
        ((1, 1, 1, 1, 1, 1), 3, (2, 2, 2)),
        ((9, 1, 1, 1, 1, 1), 2, (1, 5)),
        ((1, 1, 1, 1, 1, 9), 3, (2, 3, 1)),  # or (3, 2, 1): the dearest stage costs 9 either way
        ((4, 1, 1, 4, 1, 1), 2, (3, 3)),
        ((1, 1, 1, 1, 1, 1), 6, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_the_dearest_stage_is_as_cheap_as_it_can_be(
    seconds: tuple[float, ...], num_stages: int, expected: tuple[int, ...]
) -> None:
    module = fx.symbolic_trace(Chain())
    layers = [node for node in module.graph.nodes if node.op == "call_module"]
    costs = [float(seconds[layers.index(node)]) if node in layers else 0.0 for node in module.graph.nodes]

    stages = cut(module, choose_cuts(module, costs, num_stages))

    numbers = [len(parameters_of(stage)) // 2 for stage in stages]
    dearest = max(sum(seconds[sum(numbers[:index]) : sum(numbers[: index + 1])]) for index in range(num_stages))
    best = max(sum(seconds[sum(expected[:index]) : sum(expected[: index + 1])]) for index in range(num_stages))
    assert sum(numbers) == 6
    assert dearest == best


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_one_after_the_other_are_the_module(num_stages: int) -> None:
    module = fx.symbolic_trace(Chain())
    stages = cut(module, choose_cuts(module, [1.0] * len(module.graph.nodes), num_stages))
    inputs = torch.randn(3, 4)
    values: tuple[Any, ...] = ()
    for stage in stages:
        assert len(values) == len(stage.received)
        values = stage.module(inputs, *values)
    assert torch.equal(torch.as_tensor(values), module(inputs))
    sent = [name for stage in stages for name in stage.sent]
    assert "cos" not in sent, "what depends on the inputs alone is computed anew"


def held_by_ranks(plan: dict[str, Any], directory: Path) -> tuple[int, list[int]]:
    """Return how many numbers the parameters of the decoder have, and how many of them each rank holds."""
    start, examples = open_gpt()
    program = start.copy()
    settings = Finetune.model_validate({"kind": "finetune", "batch_size": 24, "parallel": plan})
    assert settings.parallel is not None

    def hold() -> list[int]:
        strategy = choose_strategy(settings, program, program.module, examples, [])
        parameters = program.module.parameters()
        mine = sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in parameters)
        return strategy.gather(mine)

    total = sum(parameter.numel() for parameter in program.module.parameters())
    return total, run_forked(Parallel.model_validate(plan), directory / "meeting", hold)


def test_a_replica_holds_everything(tmp_path: Path) -> None:
    total, held = held_by_ranks({"data": 2}, tmp_path)
    assert held == [total, total]


@pytest.mark.parametrize(
    ("plan", "largest_share"),
    # A pipeline is cut by measured times, which a busy machine moves.
    [({"data": 2, "shard": True}, 0.51), ({"tensor": 2}, 0.8), ({"pipeline": 2}, 0.95)],
    ids=str,
)
def test_a_rank_holds_its_share(plan: dict[str, Any], largest_share: float, tmp_path: Path) -> None:
    total, held = held_by_ranks(plan, tmp_path)
    assert len(held) == 2
    assert max(held) <= largest_share * total
    assert sum(held) >= total
