"""n of m: the pattern holds in every block of any shape, and what was pruned before stays pruned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.recipes.pruning import PruneNM
from tests.engine.techniques.learning import make_zoo
from worker.engine.errors import StepFailed
from worker.engine.programs.program import Program
from worker.engine.pruning.patterns import follows_n_of_m, from_rows, keep_n_of_m, to_rows
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.prune_n_m import inspect, run

torch.set_num_threads(1)


def prune(program: Program, **spec: Any) -> Outcome:
    context = Context(0, 1, Path(), None, lambda *_, **__: None)
    return run(program, PruneNM.model_validate({"kind": "prune_n_m", **spec}), context)


@given(
    rows=st.integers(1, 6), width=st.integers(1, 20), m=st.integers(2, 8), n=st.integers(1, 7), seed=st.integers(0, 9)
)
@settings(max_examples=100, deadline=None)
def test_every_block_keeps_its_n_largest(rows: int, width: int, m: int, n: int, seed: int) -> None:
    n = min(n, m - 1)
    torch.manual_seed(seed)
    values = torch.rand(rows, width) + 0.1
    kept = keep_n_of_m(values, n, m)
    assert follows_n_of_m(values * kept, n, m)
    for row, mask in zip(values, kept, strict=True):
        for block, chosen in zip(row.split(m), mask.split(m), strict=True):
            assert int(chosen.sum()) == min(n, len(block))
            assert not (~chosen).any() or block[chosen].min() >= block[~chosen].max()


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 4), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(8, 6, (3, 2), groups=2), nn.Conv1d(4, 5, 3)],
)
def test_rows_run_along_the_axis_and_back(layer: Any, axis: Any) -> None:
    weight = layer.weight.detach()
    assert torch.equal(from_rows(layer, to_rows(layer, weight, axis), weight.shape, axis), weight)
    if isinstance(layer, nn.Conv2d) and axis == "input":
        # The first row: output 0, kernel position (0, 0), all input channels of the group.
        assert torch.equal(to_rows(layer, weight, axis)[0], weight[0, :, 0, 0])


@pytest.mark.parametrize("name", ["mobilenet", "vit", "lstm", "unet"])
def test_families_follow_the_pattern_and_masks_only_grow(name: str) -> None:
    program = make_zoo(name)
    assert inspect(program).applicable
    prune(program, n=3, m=4)
    old = {key: mask.clone() for key, mask in program.masks.items()}
    outcome = prune(program, n=2, m=4)
    for key, mask in program.masks.items():
        layer = program.module.get_submodule(key.rpartition(".")[0])
        weight = program.module.get_parameter(key).detach()
        assert follows_n_of_m(to_rows(layer, weight, "input"), 2, 4)
        assert not (mask & ~old[key]).any()
    assert any("CPU" in warning for warning in outcome.warnings)
    # A quarter was zero before; of what was left, the second step took less than the smaller half of the squares.
    assert {effect.metric for effect in outcome.sensitivity} == {"weight_error"}
    assert len(outcome.sensitivity) == len(program.masks)
    assert all(0 < effect.effect < 0.5 for effect in outcome.sensitivity)


def test_a_pattern_wider_than_every_layer_is_refused() -> None:
    program = make_zoo("mlp")
    with pytest.raises(StepFailed) as caught:
        prune(program, n=1, m=32, skip_layers=["body.3", "head"])
    assert caught.value.code == "nothing_to_prune"
