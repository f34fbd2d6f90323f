"""Unstructured pruning: exact counts, the smallest go first, masks combine, and the report is honest."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from app.recipes.facts import TensorFacts
from app.recipes.pruning import PruneMagnitude
from tests.engine.digits import Rows
from tests.engine.techniques.digit_worlds import open_world
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.program import Program, Signature
from worker.engine.techniques import prune_wanda
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.prune_magnitude import MAX_EFFECTS, choose_rounds, inspect, run
from worker.engine.training.examples import BoundExamples


class Small(nn.Module):
    """One of each: convolution, norm, embedding, tied head, linear, recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.fc = nn.Linear(5, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.conv(self.norm(self.embedding(x)).transpose(1, 2)).mean(-1)
        return (self.head(self.fc(x)),)


def make(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    signature = Signature(
        (TensorFacts(name="x", dtype="int64", shape=("batch", 4)),),
        (TensorFacts(name="out", dtype="float32", shape=("batch", 7)),),
        None,
    )
    return Program(fx.symbolic_trace(Small()).eval(), signature, "eval", (("embedding.weight", "head.weight"),))


def prune(program: Program, **spec: Any) -> Outcome:
    context = Context(0, 1, Path(), None, lambda *_, **__: None)
    return run(program, PruneMagnitude.model_validate({"kind": "prune_magnitude", **spec}), context)


def weights(program: Program) -> dict[str, Tensor]:
    return {name: program.module.get_parameter(name).detach() for name in ("conv.weight", "fc.weight")}


@given(sparsity=st.floats(0.001, 0.999), scope=st.sampled_from(["global", "local"]), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_exactly_the_asked_share_is_zero_and_it_is_the_smallest(sparsity: float, scope: str, seed: int) -> None:
    program = make(seed)
    before = {name: weight.clone() for name, weight in weights(program).items()}
    others = {n: p.detach().clone() for n, p in program.module.named_parameters() if n not in before}

    outcome = prune(program, sparsity=sparsity, scope=scope)

    after = weights(program)
    groups = [list(before)] if scope == "global" else [[name] for name in before]
    for names in groups:
        old = torch.cat([before[name].flatten() for name in names]).abs()
        new = torch.cat([after[name].flatten() for name in names]).abs()
        assert int((new == 0).sum()) == round(sparsity * len(old))
        if (new == 0).any() and (new != 0).any():
            assert old[new == 0].max() <= old[new != 0].min()
    for name, weight in after.items():
        assert torch.equal(program.masks[name], weight != 0)
        assert torch.equal(weight[program.masks[name]], before[name][program.masks[name]])
    for name, value in others.items():
        assert torch.equal(program.module.get_parameter(name).detach(), value)
    zeros = sum(int((weight == 0).sum()) for weight in after.values())
    assert outcome.facts["weights_zeroed"] == zeros
    assert outcome.facts["sparsity"] == zeros / 120


@given(st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_equal_weights_are_pruned_in_order(sparsity: float) -> None:
    program = make()
    with torch.no_grad():
        for weight in weights(program).values():
            weight.fill_(0.5)
    prune(program, sparsity=sparsity)
    flat = torch.cat([weight.flatten() for weight in weights(program).values()])
    count = round(sparsity * 120)
    assert not flat[:count].any()
    assert flat[count:].all()


@given(first=st.floats(0.05, 0.9), second=st.floats(0.05, 0.95), scope=st.sampled_from(["global", "local"]))
@settings(max_examples=40, deadline=None)
def test_masks_combine(first: float, second: float, scope: str) -> None:
    program = make()
    with torch.no_grad():
        weights(program)["conv.weight"].flatten()[:10].zero_()  # zeros that nobody pruned
    prune(program, sparsity=first, scope=scope)
    old = {name: mask.clone() for name, mask in program.masks.items()}
    prune(program, sparsity=second, scope=scope)
    for name, mask in program.masks.items():
        assert not (mask & ~old[name]).any()
    if scope == "global":
        pruned = sum(int((~mask).sum()) for mask in program.masks.values())
        assert pruned == max(round(first * 120), round(second * 120))


def test_it_says_that_nothing_gets_smaller_or_faster() -> None:
    outcome = prune(make(), sparsity=0.5)
    assert any("neither size nor speed" in warning for warning in outcome.warnings)
    assert any("embedding" in warning and "head" in warning for warning in outcome.warnings)


def test_a_layer_that_dies_is_named() -> None:
    program = make()
    with torch.no_grad():
        program.module.get_parameter("fc.weight").mul_(1e-6)
    outcome = prune(program, sparsity=0.5)
    assert any("fc.weight" in warning for warning in outcome.warnings)


def test_skipped_layers_stay_dense() -> None:
    program = make()
    outcome = prune(program, sparsity=0.5, skip_layers=["fc"])
    assert set(program.masks) == {"conv.weight"}
    assert outcome.facts["weights_prunable"] == 90
    assert weights(program)["fc.weight"].all()


def test_unknown_and_all_skipped_layers_are_refused() -> None:
    with pytest.raises(RecipeRefused, match="nope"):
        prune(make(), sparsity=0.5, skip_layers=["nope"])
    with pytest.raises(StepFailed) as caught:
        prune(make(), sparsity=0.5, skip_layers=["fc", "conv"])
    assert caught.value.code == "nothing_to_prune"


def test_capability_names_the_layers_and_what_is_left_out() -> None:
    capability = inspect(make())
    assert capability.applicable
    assert capability.layers == ("conv", "fc")
    assert capability.missing is not None
    assert "head" in capability.missing


def test_recurrent_layers_are_prunable_and_named_where_there_are_none() -> None:
    program = make()
    program.module = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    capability = inspect(program)
    assert not capability.applicable
    assert capability.missing == "there are no linear, convolution or recurrent layers with a weight of their own"
    assert (
        prune_wanda.inspect(program).missing == "there are no linear or convolution layers with a weight of their own"
    )


@given(num_rounds=st.integers(1, 100), num_weights=st.integers(1, 3000))
def test_the_rounds_that_are_told_are_spread_and_bounded(num_rounds: int, num_weights: int) -> None:
    rounds = choose_rounds(num_rounds, num_weights)
    assert rounds[-1] == num_rounds
    assert list(rounds) == sorted(set(rounds))
    assert rounds[0] >= 1
    assert len(rounds) == min(num_rounds, max(1, MAX_EFFECTS // num_weights))
    steps = {after - before for before, after in pairwise(rounds)}
    assert not steps or max(steps) - min(steps) <= 1


GRADUAL: dict[str, Any] = {
    "kind": "prune_magnitude", "sparsity": 0.6, "scope": "local", "schedule": "linear", "num_iterations": 3,
    # So little that the weights of a round are those that the round before left.
    "training": {"epochs": 1, "max_steps": 1, "learning_rate": 1e-9, "optimizer": "sgd"},
}  # fmt: skip


def prune_digits(program: Program, examples: BoundExamples, effects: dict[str, float]) -> Outcome:
    context = Context(0, 1, Path(), examples, lambda *_, **__: None, effects=effects)
    return run(program, PruneMagnitude.model_validate(GRADUAL), context)


def test_every_round_tells_what_it_did_to_each_layer() -> None:
    program, examples = open_world(Rows)
    before = {name: float(each.detach().square().sum()) for name, each in program.module.named_parameters()}
    outcome = prune_digits(program, examples, {})
    effects = {(each.layer, each.choice.split(",")[0]): each for each in outcome.sensitivity}
    layers = {each.layer for each in outcome.sensitivity}
    assert set(effects) == {(name, f"round {index}") for name in layers for index in (1, 2, 3)}
    for name in layers:
        told = [effects[name, f"round {index}"] for index in (1, 2, 3)]
        sparsities = [float(each.choice.rpartition(" ")[2]) for each in told]
        assert sparsities == pytest.approx([0.2, 0.4, 0.6], abs=0.01)
        assert [each.chosen for each in told] == [False, False, True]
        # Each is of what the rounds before had left; together they are what is gone.
        kept = 1.0
        for each in told:
            kept *= 1 - each.effect
        after = float(program.module.get_parameter(f"{name}.weight").detach().square().sum())
        assert kept == pytest.approx(after / before[f"{name}.weight"], rel=1e-4)


def test_what_was_measured_before_a_crash_stays() -> None:
    program, examples = open_world(Rows)
    effects = {"step 0, round 1, up.weight: error": 0.125, "step 0, round 1, up.weight: sparsity": 0.5}
    outcome = prune_digits(program, examples, effects)
    assert ("round 1, sparsity 0.5", 0.125) in {(e.choice, e.effect) for e in outcome.sensitivity if e.layer == "up"}
    assert effects == {}
