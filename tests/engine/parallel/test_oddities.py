"""What few models have changes nothing either: every plan ends where one process does, or says why it cannot."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

from app.recipes.parallel import Parallel
from app.recipes.training import Finetune
from tests.engine.folders import make_folder
from tests.engine.parallel.oddities import Centered, Joined, NormedHeads, Odd, Pictures, Siamese
from tests.engine.parallel.runs import difference, find_refusal, run_and_follow, run_forked
from tests.engine.techniques.learning import bind
from tests.engine.techniques.opening import open_module
from worker.engine.devices import CPU
from worker.engine.errors import RecipeRefused
from worker.engine.parallel import pipeline
from worker.engine.parallel.choose import choose_strategy
from worker.engine.parallel.region import find_region
from worker.engine.parallel.stages import choose_cuts, cut
from worker.engine.parallel.states import State, gather_state
from worker.engine.parallel.strategy import Objective
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import find_channels
from worker.engine.training import loop
from worker.engine.training.examples import BoundExamples
from worker.engine.training.optimizers import make_optimizer

TOLERANCE = 1e-5
"""Of every tensor's norm."""
SHORT: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 0.05, "optimizer": "sgd", "warmup_fraction": 0.0, "keep_best": False,
    "gradient_clip_norm": 0.5, "weight_decay": 0.1, "batch_size": 11,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Callable[[int], Tensor], ...]]] = {
    "odd": (Odd, (lambda rows: torch.randn(rows, 16),)),
    "normed heads": (NormedHeads, (lambda rows: torch.randint(0, 20, (rows, 7)),)),
    "centered": (Centered, (lambda rows: torch.randn(rows, 16),)),
    "joined": (Joined, (lambda rows: torch.randn(rows, 16),)),
    "pictures": (Pictures, (lambda rows: torch.randn(rows, 1, 8, 8),)),
    "siamese": (Siamese, (lambda rows: torch.randn(rows, 8), lambda rows: torch.randn(rows, 8))),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("odd", {"data": 2, "shard": True}),
    ("odd", {"tensor": 2}),
    ("odd", {"pipeline": 2}),
    ("odd", {"data": 2, "pipeline": 3, "num_microbatches": 2}),
    ("normed heads", {"tensor": 2}),
    ("pictures", {"data": 2}),
    ("siamese", {"pipeline": 2, "num_microbatches": 1}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("centered", {"tensor": 2}, "no_tensor_plan"),
    ("joined", {"tensor": 2}, "no_tensor_plan"),
    ("pictures", {"pipeline": 2}, "batch_norm_in_pipeline"),
    ("siamese", {"pipeline": 4, "num_microbatches": 1}, "too_few_layers"),
]


@pytest.fixture(autouse=True)
def _one_thread_that_reports_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "REPORT_INTERVAL_SECONDS", 0.0)


@cache
def open_odd(name: str) -> tuple[Program, BoundExamples]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    program = open_module(make(), tuple(each(4) for each in inputs), make_folder())
    rows = {tensor.name: each(50).numpy() for tensor, each in zip(program.signature.inputs, inputs, strict=True)}
    rows["label"] = torch.randint(0, 3, (50,)).numpy()
    scales = dict.fromkeys((tensor.name for tensor in program.signature.inputs), 1.0)
    data = {"task": "classification", "label_column": "label"}
    return program, bind(program, make_folder(), rows, scales, by_name=True, **data)


@cache
def train_alone(name: str) -> tuple[Program, list[float]]:
    start, examples = open_odd(name)
    program = start.copy()
    return program, run_and_follow(program, examples, make_folder(), **SHORT)[1]


@pytest.mark.parametrize(("name", "plan"), CASES, ids=str)
def test_a_plan_ends_where_one_process_does(name: str, plan: dict[str, Any], tmp_path: Path) -> None:
    start, examples = open_odd(name)
    alone, curve = train_alone(name)
    outcome, losses = run_and_follow(start.copy(), examples, tmp_path / "run", **SHORT, parallel=plan)
    assert isinstance(outcome.program, Program)
    assert difference(alone, outcome.program) < TOLERANCE < difference(alone, start)
    assert losses == pytest.approx(curve, rel=TOLERANCE)
    types = [each.dtype for each in start.module.state_dict().values()]
    assert [each.dtype for each in outcome.program.module.state_dict().values()] == types


def test_a_tensor_may_get_its_first_gradient_behind_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, examples = open_odd("odd")
    (index,) = (index for index, node in enumerate(start.module.graph.nodes) if node.target == "enter")
    monkeypatch.setattr(pipeline, "choose_cuts", lambda *_: [index])
    plan = {"pipeline": 2, "timeout_seconds": 20}
    outcome, _ = run_and_follow(start.copy(), examples, tmp_path / "run", **SHORT, parallel=plan)
    assert isinstance(outcome.program, Program)
    assert difference(train_alone("odd")[0], outcome.program) < TOLERANCE


@pytest.mark.parametrize(("name", "plan", "code"), REFUSED, ids=str)
def test_or_it_is_refused(name: str, plan: dict[str, Any], code: str, tmp_path: Path) -> None:
    start, examples = open_odd(name)
    assert find_refusal(start, examples, tmp_path, **SHORT, parallel=plan) == code


def test_no_rank_can_normalize_a_part_of_the_channels(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    program = open_module(module, (torch.zeros(2, 16),), tmp_path)
    channels = find_channels(program)
    (group,) = channels.groups
    assert find_region(program, channels.flow, group) is None


def test_a_stage_tells_what_became_of_its_own_buffers(tmp_path: Path) -> None:
    plan = {"pipeline": 2, "num_microbatches": 1}
    alone = state_after_a_step(None)
    staged = run_forked(Parallel.model_validate(plan), tmp_path / "meeting", lambda: state_after_a_step(plan))
    buffers = [name for name in alone if name.startswith("buffer")]
    assert buffers
    for name in buffers:
        assert torch.allclose(alone[name]["value"], staged[name]["value"], atol=1e-6), name


def state_after_a_step(plan: dict[str, Any] | None) -> State:
    start, examples = open_odd("siamese")
    program = start.copy()
    step = Finetune.model_validate({"kind": "finetune", **SHORT, "parallel": plan})
    strategy = choose_strategy(step, program, program.module, examples, [])
    program.module.train()
    batch = next(iter(examples.training_batches(11, seed=0)))
    objective = Objective(lambda outputs, seen: examples.loss(outputs, cast(Tensor, seen.labels)), "fp32", CPU)
    strategy.backward([(batch, 1.0)], objective)
    return gather_state(strategy, program.module, make_optimizer(program.module, step))


@pytest.mark.parametrize("dearest", ["enter", "exact", "leave"])
def test_what_is_written_piece_by_piece_is_not_made_anew_in_every_stage(dearest: str) -> None:
    program, _ = open_odd("odd")
    module, inputs = program.module.eval(), program.example_inputs(3)
    costs = [100.0 if node.target == dearest else 1.0 for node in module.graph.nodes]
    values: tuple[Any, ...] = ()
    for stage in cut(module, choose_cuts(module, costs, 2)):
        values = stage.module(*inputs, *values)
    for one, other in zip(values, module(*inputs), strict=True):
        assert torch.equal(one, other)


class Window(nn.Module):
    """Writes into a part of a tensor that it has taken out long before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        table = self.layers[0](x)
        view = torch.ops.aten.slice.Tensor(table, 1, 0, 2)
        y = self.layers[1](x)
        torch.ops.aten.copy_.default(view, torch.ops.aten.slice.Tensor(y, 1, 0, 2))
        result: Tensor = self.layers[3](self.layers[2](table))
        return result


def test_a_view_and_what_is_written_into_it_stay_in_one_stage() -> None:
    module = fx.symbolic_trace(Window())
    nodes = list(module.graph.nodes)
    calls = {str(node.target): index for index, node in enumerate(nodes) if node.op == "call_module"}
    costs = [1.0 if node.op == "call_module" else 0.0 for node in nodes]
    assert choose_cuts(module, costs, 2) == [calls["layers.2"]]
    with pytest.raises(RecipeRefused, match="4 layers with trainable weights"):
        choose_cuts(module, costs, 4)
