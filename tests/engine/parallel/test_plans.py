"""Every plan ends where one process does with the same batches."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from app.recipes.parallel import Parallel
from app.recipes.training import Finetune
from tests.engine.folders import make_folder
from tests.engine.parallel.runs import difference, find_refusal, run_and_follow, run_forked, without_dropout
from tests.engine.techniques.learning import bind, digit_examples, make_cnn, make_zoo, random_examples
from worker.engine.devices import CPU
from worker.engine.parallel.choose import choose_strategy
from worker.engine.parallel.pipeline import schedule
from worker.engine.parallel.states import State, gather_state, load_state
from worker.engine.parallel.strategy import Fact, Objective
from worker.engine.programs.program import Program
from worker.engine.training import loop
from worker.engine.training.examples import BoundExamples
from worker.engine.training.optimizers import make_optimizer
from worker.engine.training.parts import split_batch

TOLERANCE = 1e-5
"""Of every tensor's norm, after a few steps: sums in another order."""
SHORT: dict[str, Any] = {
    "max_steps": 4, "learning_rate": 0.05, "optimizer": "sgd", "warmup_fraction": 0.0, "keep_best": False,
    "gradient_clip_norm": 0.5, "batch_size": 51,
}  # fmt: skip
GPT: list[dict[str, Any]] = [
    {"data": 2}, {"data": 2, "shard": True}, {"tensor": 2}, {"pipeline": 2}, {"pipeline": 3, "schedule": "gpipe"},
    {"data": 2, "tensor": 2}, {"data": 2, "pipeline": 2, "num_microbatches": 3},
]  # fmt: skip
CNN: list[dict[str, Any]] = [{"data": 2}, {"data": 2, "shard": True}, {"pipeline": 2, "num_microbatches": 1}]


@pytest.fixture(autouse=True)
def _one_thread_that_reports_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "REPORT_INTERVAL_SECONDS", 0.0)


@cache
def open_gpt() -> tuple[Program, BoundExamples]:
    program = without_dropout(make_zoo("gpt"))
    mask(program, "blocks.1.mlp.0.weight")
    return program, random_examples(program, make_folder(), task="language_modeling")


@cache
def open_cnn() -> tuple[Program, BoundExamples]:
    program = make_cnn(8)
    mask(program, "convs.1.weight")
    return program, digit_examples(program, make_folder())


@cache
def open_encoder() -> tuple[Program, BoundExamples]:
    program = without_dropout(make_zoo("encoder_decoder"))
    rows = {"tokens": program.example_inputs(96)[0].numpy(), "label": np.arange(96) % 3}
    labels = {"task": "classification", "label_column": "label"}
    return program, bind(program, make_folder(), rows, {"tokens": 1.0}, by_name=True, **labels)


def open_few() -> tuple[Program, BoundExamples]:
    """Return a model with three rows for training, and one apart."""
    program = make_cnn(4)
    rows: dict[str, np.ndarray] = {"image": np.zeros((4, 1, 8, 8), np.float32), "label": np.arange(4)}
    return program, bind(program, make_folder(), rows, {"image": 1.0}, task="classification", label_column="label")


def mask(program: Program, name: str) -> None:
    """Prune half of a weight."""
    shape = program.module.get_parameter(name).shape
    program.masks[name] = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    program.apply_masks()


OPENERS = {"gpt": open_gpt, "cnn": open_cnn, "encoder": open_encoder}


@cache
def train_alone(model: str, spec: str) -> tuple[Program, dict[str, Fact], list[float]]:
    start, examples = OPENERS[model]()
    program = start.copy()
    outcome, losses = run_and_follow(program, examples, make_folder(), **(SHORT | json.loads(spec)))
    return program, outcome.facts, losses


def compare(model: str, plan: dict[str, Any], tolerance: float = TOLERANCE, **spec: Any) -> dict[str, Fact]:
    """Train under the plan and alone; return the facts of the plan."""
    start, examples = OPENERS[model]()
    alone, expected, curve = train_alone(model, json.dumps(spec))
    outcome, losses = run_and_follow(start.copy(), examples, make_folder(), **(SHORT | spec), parallel=plan)
    together, facts = outcome.program, outcome.facts
    assert isinstance(together, Program)
    kinds = [type(layer).__name__ for layer in start.module.modules()]
    assert difference(alone, together) < tolerance < difference(alone, start)
    assert len(curve) > SHORT["max_steps"]
    assert losses == pytest.approx(curve, rel=tolerance)
    assert facts["last_loss"] == pytest.approx(expected["last_loss"], rel=tolerance)
    assert facts["quality_after"] == pytest.approx(expected["quality_after"], rel=tolerance)
    for name, kept in together.masks.items():
        assert not together.module.get_parameter(name)[~kept].any()
    assert [type(layer).__name__ for layer in together.module.modules()] == kinds
    assert not any("forward" in vars(layer) for layer in together.module.modules()), "nothing of the plan is left"
    for group in together.tied:
        assert len({id(together.module.get_parameter(name)) for name in group}) == 1
    inputs = together.example_inputs(3)
    with torch.no_grad():
        output, expected_output = together.module.eval()(*inputs)[0], alone.module.eval()(*inputs)[0]
    assert float((output - expected_output).norm()) < 10 * tolerance * float(expected_output.norm())
    return facts


@pytest.mark.parametrize("plan", GPT, ids=str)
def test_a_pruned_transformer_with_tied_weights(plan: dict[str, Any]) -> None:
    facts = compare("gpt", plan)
    assert facts["ranks"] == Parallel.model_validate(plan).num_ranks
    assert 0 < float(facts["communication_share"] or 0) < 1
    assert len(str(facts["memory_per_rank"]).split(",")) == facts["ranks"]


@pytest.mark.long
@pytest.mark.parametrize("plan", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_attention_as_torch_writes_it(plan: dict[str, Any]) -> None:
    compare("encoder", plan)


@pytest.mark.parametrize("plan", CNN, ids=str)
def test_a_pruned_cnn_with_batch_norms(plan: dict[str, Any]) -> None:
    compare("cnn", plan)


@pytest.mark.parametrize("plan", [{"data": 2}, {"data": 2, "shard": True}], ids=str)
def test_accumulated_parts_are_shared_out_too(plan: dict[str, Any]) -> None:
    compare("cnn", plan, accumulate=2)


def test_bf16_differs_by_its_own_rounding_only() -> None:
    compare("gpt", {"data": 2}, 0.02, precision="bf16")


def open_limited() -> tuple[Program, BoundExamples]:
    """Return a model that takes three examples at a time at most."""
    program = make_cnn(4)
    program.signature = replace(program.signature, dynamic_ranges={"batch": (1, 3)})
    return program, digit_examples(program, make_folder())


WORLDS: dict[str, Callable[[], tuple[Program, BoundExamples]]] = {
    "gpt": open_gpt, "cnn": open_cnn, "few": open_few, "limited": open_limited,
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "batch norm and micro-batches": ("cnn", {"pipeline": 2}, "batch_norm_in_pipeline"),
    "convolutions": ("cnn", {"tensor": 2}, "no_tensor_plan"),
    "more stages than layers": ("cnn", {"pipeline": 6, "num_microbatches": 1}, "too_few_layers"),
    "fewer rows at a time than parts": ("limited", {"data": 4}, "fixed_batch_not_divisible"),
    "fewer rows than parts": ("few", {"data": 4}, "too_few_examples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    model, plan, code = REFUSED[case]
    start, examples = WORLDS[model]()
    assert find_refusal(start, examples, tmp_path, **SHORT, parallel=plan) == code


@pytest.mark.parametrize("plan", [{"data": 2, "shard": True}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_state_made_under_one_plan_is_the_state_under_another(plan: dict[str, Any], tmp_path: Path) -> None:
    alone = make_state(None, None)
    step = Parallel.model_validate(plan)
    gathered = run_forked(step, tmp_path / "one", lambda: make_state(plan, None))
    assert gathered.keys() == alone.keys()
    returned = run_forked(step, tmp_path / "two", lambda: make_state(plan, alone))
    for name, kept in alone.items():
        for key, value in kept.items():
            assert torch.allclose(gathered[name][key], value, atol=1e-6), (name, key)
            assert torch.equal(returned[name][key], value), (name, key)


def make_state(plan: dict[str, Any] | None, given: State | None) -> State:
    """Take one step, or load a state, and return the whole state (on ranks other than 0 an empty one)."""
    start, examples = open_gpt()
    program = start.copy()
    settings = Finetune.model_validate({"kind": "finetune", "optimizer": "sgd", "parallel": plan})
    strategy = choose_strategy(settings, program, program.module, examples, [])
    optimizer = make_optimizer(program.module, settings)
    if given is None:
        batch = next(iter(examples.training_batches(24, seed=0)))
        parts = split_batch(
            batch, examples.task, 4 if plan and "pipeline" in plan else 1, strategy.num_shares, strategy.share
        )
        objective = Objective(lambda outputs, seen: examples.loss(outputs, cast(Tensor, seen.labels)), "fp32", CPU)
        program.module.train()
        strategy.backward(parts, objective)
        optimizer.step()
        strategy.predict(*batch[0])  # an epoch ends with a measurement, and then comes a checkpoint
    else:
        load_state(strategy, program.module, optimizer, given)
    return gather_state(strategy, program.module, optimizer)


def test_schedules_hold_as_many_activations_as_they_say() -> None:
    def most_held(kind: str, stage: int) -> int:
        held = most = 0
        for direction, _ in schedule(kind, stage, 4, 8):
            held += 1 if direction == "forward" else -1
            most = max(most, held)
        assert held == 0
        return most

    assert [most_held("gpipe", stage) for stage in range(4)] == [8, 8, 8, 8]
    assert [most_held("1f1b", stage) for stage in range(4)] == [4, 3, 2, 1]
