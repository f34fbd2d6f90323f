"""Wanda: every row loses exactly its share, judged with the inputs that pruned layers before it make."""

from pathlib import Path

import pytest
import torch

from app.recipes.pruning import PruneMagnitude, PruneNM, PruneWanda
from tests.engine.digits import Convolutions, Rows
from tests.engine.techniques.digit_worlds import World, open_world
from worker.engine.measure.activations import FeatureNorms, collect
from worker.engine.pruning.patterns import follows_n_of_m, to_rows
from worker.engine.techniques import prune_magnitude, prune_n_m
from worker.engine.techniques.base import Context
from worker.engine.techniques.prune_wanda import inspect, run
from worker.engine.training.calibration import calibration_batches
from worker.engine.training.examples import BoundExamples

torch.set_num_threads(1)


@pytest.fixture(params=[Convolutions, Rows])
def world(request: pytest.FixtureRequest) -> World:
    return open_world(request.param)


def context(examples: BoundExamples) -> Context:
    return Context(0, 1, Path(), examples, lambda *_, **__: None)


def test_every_row_loses_its_share_by_the_score(world: World) -> None:
    program, examples = world
    before = {name: value.detach().clone() for name, value in program.module.named_parameters()}
    step = PruneWanda(kind="prune_wanda", sparsity=0.5, num_calibration_examples=50)
    outcome = run(program, step, context(examples))
    assert outcome.facts["num_calibration_examples"] == 50
    layers = inspect(program).layers
    # The norms of the pruned program are those that every layer was judged with: its own weight comes after its input.
    norms = collect(program, layers, calibration_batches(examples, 50, 0), FeatureNorms)
    for name in layers:
        mask, old = program.masks[f"{name}.weight"].flatten(1), before[f"{name}.weight"].flatten(1)
        assert ((~mask).sum(1) == round(0.5 * mask.shape[1])).all()
        score = old.abs() * norms[name].squares.sqrt().float()
        highest = score.masked_fill(mask, 0).amax(1)
        lowest = score.masked_fill(~mask, float("inf")).amin(1)
        assert (highest <= lowest * (1 + 1e-5)).all()
    for effect in outcome.sensitivity:
        mask, old = program.masks[f"{effect.layer}.weight"], before[f"{effect.layer}.weight"].double()
        assert effect.effect == pytest.approx(float(old[~mask].square().sum() / old.square().sum()), rel=1e-5)
    assert {effect.layer for effect in outcome.sensitivity} == set(layers)


def test_n_of_m_by_activations(world: World) -> None:
    program, examples = world
    step = PruneNM(kind="prune_n_m", criterion="wanda", num_calibration_examples=40)
    prune_n_m.run(program, step, context(examples))
    assert program.masks
    for name in program.masks:
        layer = program.module.get_submodule(name.rpartition(".")[0])
        assert follows_n_of_m(to_rows(layer, program.module.get_parameter(name).detach(), "input"), 2, 4)


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_gradual_pruning_trains_and_ends_exact(world: World, schedule: str) -> None:
    program, examples = world
    step = PruneMagnitude.model_validate(
        {
            "kind": "prune_magnitude", "sparsity": 0.7, "schedule": schedule, "num_iterations": 3,
            "training": {"epochs": 1, "max_steps": 4},
        }
    )  # fmt: skip
    outcome = prune_magnitude.run(program, step, context(examples))
    total = int(outcome.facts["weights_prunable"] or 0)
    assert sum(int((~mask).sum()) for mask in program.masks.values()) == round(0.7 * total)
    assert outcome.facts["steps_run"] == 8
    assert len(outcome.sensitivity) == 3 * len(program.masks)  # of every round
    assert all(0 <= effect.effect < 1 for effect in outcome.sensitivity)
    assert sum(effect.chosen for effect in outcome.sensitivity) == len(program.masks)  # those of the last
    shares = [prune_magnitude.sparsity_after(step, index, 3, 0.1) for index in (1, 2, 3)]
    assert shares == sorted(shares)
    assert shares[-1] == 0.7
    assert shares[0] == pytest.approx(0.7 - 0.6 * (8 / 27 if schedule == "cubic" else 2 / 3))
