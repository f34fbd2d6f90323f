"""Pruning to a share of MACs, parameters or latency, and in rounds with training between."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from app.recipes.data import Data
from app.recipes.recipe import Recipe, Target
from tests.engine.techniques.learning import digit_examples, make_cnn
from tests.engine.techniques.pruning_models import load, load_module, prune, pruned, size
from worker.engine.errors import StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.programs.program import Program
from worker.engine.pruning.budget import make_ladder, search_count
from worker.engine.pruning.groups import ChannelGroup
from worker.engine.pruning.ranking import Chosen, choose_units
from worker.engine.training.examples import BoundExamples, open_examples

ID = "dst_" + "a" * 26


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@given(
    counts=st.lists(st.integers(2, 64), min_size=1, max_size=5), remaining=st.floats(0.05, 1),
    round_to=st.sampled_from([1, 2, 8]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_search_finds_the_smallest_step_that_is_enough(
    counts: list[int], remaining: float, round_to: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = [
        ChannelGroup(f"layer{i}", "channels", np.arange(n), 1, (1,), (), (f"layer{i}",)) for i, n in enumerate(counts)
    ]
    scores = [rng.random(n) for n in counts]

    def choose(ratio: float) -> Chosen:
        return choose_units(groups, scores, ratio=ratio, scope="local", round_to=round_to)

    def count(chosen: Chosen) -> float:
        return 1 - sum(len(units) for units in chosen.values()) / sum(counts)

    ladder = make_ladder(choose, {group.name: score for group, score in zip(groups, scores, strict=True)})
    shares = [count(step) for step in ladder]
    assert ladder[0] == {}
    assert all(after < before for before, after in pairwise(shares))
    for one, other in pairwise(ladder):
        assert sum(len(other[name]) != len(one.get(name, ())) for name in other) == 1
    if shares[-1] > remaining:
        with pytest.raises(StepFailed) as caught:
            search_count(remaining, ladder, count)
        assert caught.value.code == "target_unreachable"
        return
    found = search_count(remaining, ladder, count)
    assert found.remaining == count(found.chosen) <= remaining
    index = next(i for i, step in enumerate(ladder) if step is found.chosen)
    assert index == 0 or shares[index - 1] > remaining


@pytest.mark.parametrize(("of", "scope"), [("macs", "local"), ("parameters", "global")])
def test_the_share_of_a_counted_quantity_is_reached(of: str, scope: str, tmp_path: Path) -> None:
    program = load("mobilenet", tmp_path)
    outcome = prune(program, of=of, ratio=0.5, round_to=1, scope=scope)
    small = pruned(outcome)
    share = {
        "macs": 1 - count_macs(small).total / count_macs(program).total,
        "parameters": 1 - size(small) / size(program),
    }[of]
    assert outcome.facts["share_reached"] == pytest.approx(share)
    assert 0.5 <= share < 0.55
    assert outcome.facts["share_asked"] == 0.5


def test_among_equals_global_takes_first_what_saves_most() -> None:
    groups = [ChannelGroup(name, "channels", np.arange(8), 1, (1,), (), (name,)) for name in ("cheap", "dear")]
    scores = [np.full(8, 1.0), np.full(8, 1.5)]

    def kept(savings: list[float] | None) -> list[int]:
        chosen = choose_units(groups, scores, ratio=0.375, scope="global", round_to=1, savings=savings)
        return [8 - len(chosen.get(group.name, ())) for group in groups]

    assert kept(None) == [2, 8]
    assert kept([1.0, 2.0]) == [8, 2]


def test_global_taylor_spends_a_budget_of_macs_where_maps_are_large_and_one_of_parameters_where_they_are_small(
    tmp_path: Path,
) -> None:
    program = make_cnn(16, depth=4, stride=2)
    examples = digit_examples(program, tmp_path)
    early: dict[str, float] = {}
    for of in ("macs", "parameters"):
        small = pruned(
            prune(program.copy(), examples, of=of, ratio=0.4, round_to=1, criterion="taylor", scope="global")
        )
        widths = [layer.out_channels for layer in small.module.modules() if isinstance(layer, nn.Conv2d)]
        early[of] = widths[0] / sum(widths)
    assert early["macs"] < early["parameters"]


def test_a_share_that_cannot_be_reached_is_refused_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"leaves \d+\.\d%; 10\.0% was asked for") as caught:
        prune(load("vit", tmp_path), of="parameters", ratio=0.9, structures=["heads"])
    assert "structures" in caught.value.fix


def test_latency_is_measured_and_what_was_reached_is_told(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    program = load_module(module, (torch.randn(2, 64),), tmp_path)
    target = Target(num_runs=10, batch_size=8)
    outcome = prune(program, of="latency", ratio=0.1, round_to=128, directory=tmp_path, target=target)
    facts = outcome.facts
    assert facts["probes"] == 1
    assert facts["channels_removed"] == 128
    assert facts["share_asked"] == 0.1
    assert isinstance(reached := facts["share_reached"], float)
    assert reached < 1
    assert any("less latency and measured" in warning for warning in outcome.warnings) == (reached < 0.1)


def bind_random_data(program: Program, directory: Path) -> BoundExamples:
    rng = np.random.default_rng(0)
    np.savez(directory / "data.npz", x=rng.normal(size=(80, 16)).astype(np.float32), y=rng.integers(0, 4, 80))
    name = program.signature.inputs[0].name
    data = Data.model_validate(
        {"dataset_id": ID, "task": "classification", "label_column": "y", "inputs": {name: {"column": "x"}}}
    )
    return open_examples(data, {ID: (directory / "data.npz", "npz")}, program.signature, 0, directory)


def test_rounds_judge_anew_and_train_between(tmp_path: Path) -> None:
    program = load("mlp", tmp_path)
    examples = bind_random_data(program, tmp_path)
    training = {"epochs": 1, "batch_size": 16, "keep_best": False}
    spec: dict[str, Any] = {"ratio": 0.75, "round_to": 1, "criterion": "taylor", "batch_size": 16}
    once = prune(program.copy(), examples, **spec)
    rounds = prune(program.copy(), examples, num_iterations=3, **spec)
    trained = prune(program.copy(), examples, num_iterations=3, training=training, **spec)
    widths = [pruned(each).module.get_parameter("body.3.weight").shape for each in (once, rounds, trained)]
    assert widths == [(16, 16)] * 3
    assert once.facts["channels_removed"] == rounds.facts["channels_removed"] == 96
    assert "training_steps" not in rounds.facts
    # 64 training rows in batches of 16, after the first and the second of three rounds.
    assert trained.facts["training_steps"] == 2 * 4
    weights = [pruned(each).module.get_parameter("body.3.weight") for each in (once, rounds, trained)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_rounds_reach_a_share_of_macs_of_the_original(tmp_path: Path) -> None:
    program = load("cnn", tmp_path)
    outcome = prune(program, of="macs", ratio=0.6, round_to=1, num_iterations=3)
    share = 1 - count_macs(pruned(outcome)).total / count_macs(program).total
    assert 0.6 <= share < 0.68
    assert outcome.facts["share_reached"] == pytest.approx(share)


def test_the_recipe_refuses_what_makes_no_sense() -> None:
    wrong: tuple[dict[str, Any], ...] = ({"training": {}}, {"structures": []}, {"structures": ["neurons"]})
    for step in wrong:
        with pytest.raises(ValidationError):
            Recipe.model_validate({"steps": [{"kind": "prune_structured", **step}]})
