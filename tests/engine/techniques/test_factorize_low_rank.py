"""Low rank: errors are what theory says, ranks fit, layers never grow, and what comes out exports and trains on."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.low_rank import FactorizeLowRank
from app.recipes.metrics import LayerEffect
from app.recipes.pruning import PruneMagnitude
from app.recipes.quantization import QuantizeInt8
from app.recipes.training import Finetune
from tests.engine.digits import Convolutions, Rows
from tests.engine.techniques.digit_worlds import World, open_world
from tests.engine.techniques.learning import make_zoo
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.low_rank.factors import Factors, Option
from worker.engine.low_rank.ranks import spread_budget
from worker.engine.low_rank.replacement import make_layers
from worker.engine.measure.macs import count_macs
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.techniques import finetune, prune_magnitude, quantize_int8
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.factorize_low_rank import inspect, run
from worker.engine.training.calibration import calibration_batches

torch.set_num_threads(1)


@pytest.fixture(params=[Convolutions, Rows])
def world(request: pytest.FixtureRequest) -> World:
    return open_world(request.param)


def factorize(program: Program, examples: Any = None, **spec: Any) -> Outcome:
    context = Context(0, 1, Path(), examples, lambda *_, **__: None)
    return run(program, FactorizeLowRank.model_validate({"kind": "factorize_low_rank", **spec}), context)


def size(program: Program) -> int:
    return sum(each.numel() for each in program.module.parameters())


@given(outputs=st.integers(2, 12), inputs=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_svd_error_is_the_norm_of_the_singular_values_left_out(outputs: int, inputs: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    rank = min(rank, outputs, inputs)
    (first, second), error = Factors(layer, "matrix").factorize((rank,))
    squares = torch.linalg.svdvals(layer.weight.detach().double()).square()
    assert error == pytest.approx(float(squares[rank:].sum() / squares.sum()), abs=1e-9)
    difference = layer.weight.detach().double() - second @ first
    assert float(difference.square().sum()) == pytest.approx(float(squares[rank:].sum()), abs=1e-9)


@given(kind=st.sampled_from(["matrix", "spatial", "tucker2"]), seed=st.integers(0, 9), rank=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_whitened_error_is_no_larger_on_the_calibration_examples(kind: Any, seed: int, rank: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(9, 7) if kind == "matrix" else nn.Conv2d(5, 6, 3)
    rows = torch.randn(400, layer.weight[0].numel()) @ torch.randn(layer.weight[0].numel(), layer.weight[0].numel())
    gram = rows.T @ rows
    plain, whitened = Factors(layer, kind), Factors(layer, kind, gram)
    ranks = plain.limit(rank)
    weights, _ = plain.factorize(ranks)
    chain = nn.Sequential(*make_layers(layer, kind, weights))
    probe = torch.eye(9) if kind == "matrix" else torch.eye(45).reshape(45, 5, 3, 3)
    with torch.no_grad():
        effective = (chain(probe) - chain(torch.zeros_like(probe))).flatten(1).T
    assert whitened.factorize(ranks)[1] <= whitened.error_of(effective.double()) + 1e-6


@pytest.mark.parametrize("kind", ["matrix", "spatial", "tucker2"])
def test_whitening_fits_every_factor_to_inputs_that_differ_in_size(kind: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16) if kind == "matrix" else nn.Conv2d(6, 16, 3)
    features = layer.weight[0].numel()
    rows = torch.randn(400, features) * torch.logspace(0, 1.5, features)[torch.randperm(features)]
    gram = rows.T @ rows
    plain, whitened = Factors(layer, kind), Factors(layer, kind, gram)
    ranks = plain.limit(4)
    weights, _ = plain.factorize(ranks)
    product = weights[1] @ weights[0] if kind == "matrix" else None
    if product is None:
        chain = nn.Sequential(*make_layers(layer, kind, weights))
        probe = torch.eye(features).reshape(features, 6, 3, 3)
        with torch.no_grad():
            product = (chain(probe) - chain(torch.zeros_like(probe))).flatten(1).T.double()
    assert whitened.factorize(ranks)[1] < 0.8 * whitened.error_of(product)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", ["spatial", "tucker2"])
@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 1), "padding": (1, 2), "dilation": 2}, {"padding": "same"}])
def test_full_rank_reproduces_the_convolution(kind: Any, geometry: dict[str, Any], whiten: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 2), **geometry)
    gram = torch.eye(24) if whiten else None
    weights, error = Factors(layer, kind, gram).factorize((12,) if kind == "spatial" else (4, 6))
    assert error < 1e-12
    x = torch.randn(2, 4, 11, 9)
    chain = nn.Sequential(*make_layers(layer, kind, weights))
    with torch.no_grad():
        torch.testing.assert_close(chain(x), layer(x), atol=1e-5, rtol=1e-4)


@given(
    curves=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    share=st.floats(0.1, 1),
)
@settings(max_examples=150, deadline=None)
def test_budget_is_kept_and_close_to_the_best(curves: list[list[tuple[int, float]]], share: float) -> None:
    options = []
    for steps in curves:
        cost, error = 0, 5.0
        curve: list[Option] = []
        for extra, drop in steps:
            cost, error = cost + extra, error - drop
            curve.append(Option((len(curve) + 1,), cost, error))
        options.append(curve)
    budget = int(share * sum(curve[-1].num_weights for curve in options))
    combinations = [
        sum(each.error for each in chosen)
        for chosen in product(*options)
        if sum(each.num_weights for each in chosen) <= budget
    ]
    if not combinations:
        with pytest.raises(StepFailed):
            spread_budget(options, budget)
        return
    picked = [curve[index] for curve, index in zip(options, spread_budget(options, budget), strict=True)]
    assert sum(each.num_weights for each in picked) <= budget
    # The greedy way can miss what one step of one curve saves.
    largest = max(a.error - b.error for curve in options for a in curve for b in curve)
    assert sum(each.error for each in picked) <= min(combinations) + largest + 1e-9


@pytest.mark.parametrize("name", ["mobilenet", "unet", "gpt", "two_tower"])
def test_every_family_gets_smaller_and_is_imported_again(name: str, tmp_path: Path) -> None:
    program = make_zoo(name)
    assert inspect(program).applicable
    before, macs = size(program), count_macs(program).total
    outcome = factorize(program, rank_by="ratio", ratio=0.6)
    assert size(program) < before
    assert outcome.facts["parameters_after"] == size(program)
    assert outcome.facts["macs_before"] == macs
    assert outcome.facts["macs_after"] == count_macs(program).total
    assert sum(effect.chosen for effect in outcome.sensitivity) == outcome.facts["layers_factorized"]
    if name in ("mobilenet", "unet"):
        return
    inputs = program.example_inputs(5)
    program.module.eval()
    export_pt2(program, tmp_path / "result.pt2")
    again = open_program(tmp_path / "result.pt2", tmp_path)
    assert again.signature == program.signature
    again.module.eval()
    for one, other in zip(again.module(*inputs), program.module(*inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "kind"), [("cnn", "tucker2"), ("cnn", "spatial"), ("gpt", "none")])
def test_the_errors_of_other_ranks_are_told_too(name: str, kind: str) -> None:
    outcome = factorize(make_zoo(name), rank_by="ratio", ratio=0.6, convolutions=kind)
    by_layer: dict[str, list[LayerEffect]] = {}
    for effect in outcome.sensitivity:
        by_layer.setdefault(effect.layer, []).append(effect)
    assert len(by_layer) == outcome.facts["layers_factorized"]
    for effects in by_layer.values():
        assert [effect.chosen for effect in effects].count(True) == 1
        assert len(effects) >= 2
        sizes = [effect.weight_bytes or 0 for effect in effects]
        assert sizes == sorted(sizes)
        errors = [effect.effect for effect in effects]
        assert errors == sorted(errors, reverse=True)
    assert outcome.facts["largest_layer_error"] == max(each.effect for each in outcome.sensitivity if each.chosen)


def test_a_layer_that_stays_whole_tells_what_factors_would_have_cost() -> None:
    outcome = factorize(make_zoo("cnn"), rank_by="rank", rank=8)
    whole = {effect.layer for effect in outcome.sensitivity} - {e.layer for e in outcome.sensitivity if e.chosen}
    assert len(whole) == outcome.facts["layers_left_whole"] == 2


@pytest.mark.parametrize(("name", "kind"), [("cnn", "tucker2"), ("cnn", "spatial"), ("vit", "tucker2")])
def test_onnx_runtime_computes_the_same(name: str, kind: str, tmp_path: Path) -> None:
    program = make_zoo(name)
    original = program.copy()
    factorize(program, rank_by="ratio", ratio=0.7, convolutions=kind)
    export_onnx(program, tmp_path / "result.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "result.onnx", providers=["CPUExecutionProvider"])
    (inputs,) = program.example_inputs(5, seed=1)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        (expected,), (unchanged,) = program.module.eval()(inputs), original.module.eval()(inputs)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, unchanged, atol=1e-3)


@pytest.mark.parametrize("kind", ["tucker2", "spatial"])
def test_whitening_lowers_the_error_of_every_layer_on_the_calibration_examples(world: World, kind: str) -> None:
    original, examples = world
    batches = list(calibration_batches(examples, 64, 0))
    spec: dict[str, Any] = {"rank_by": "rank", "rank": 5, "convolutions": kind, "num_calibration_examples": 64}
    programs = [original.copy(), original.copy()]
    outcomes = [
        factorize(program, examples, whiten=whiten, **spec)
        for program, whiten in zip(programs, (False, True), strict=True)
    ]
    plain_effects, effects = ([each for each in outcome.sensitivity if each.chosen] for outcome in outcomes)
    names = [effect.layer for effect in effects]
    assert names == [effect.layer for effect in plain_effects]
    assert [effect.choice for effect in plain_effects] == [each.choice for each in effects]
    inputs = record_inputs(original, names, batches)
    errors = [[error_on(original, program, name, inputs[name]) for name in names] for program in programs]
    for plain, whitened in zip(*errors, strict=True):
        # What is minimized has a little of the identity added.
        assert whitened <= plain * 1.01
    assert sum(errors[1]) < 0.9 * sum(errors[0])
    for effect, error in zip(effects, errors[1], strict=True):
        assert effect.metric == "layer_output_error"
        assert effect.effect == pytest.approx(error, rel=0.1, abs=1e-3)


def record_inputs(program: Program, names: list[str], batches: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return what goes into the layers."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        program.module.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0]))
        for name in names
    ]
    program.module.eval()
    with torch.no_grad():
        for inputs in batches:
            program.module(*inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def error_on(original: Program, factorized: Program, name: str, inputs: Tensor) -> float:
    """Return the relative squared error of a layer's output, its bias aside."""
    layer, chain = original.module.get_submodule(name), nn.Sequential(*factorized.module.get_submodule(name).children())
    with torch.no_grad():
        base, zeros = layer(inputs), layer(torch.zeros_like(inputs))
        return float((chain(inputs) - base).square().sum() / (base - zeros).square().sum())


def test_later_steps_work_on_the_factors(world: World, tmp_path: Path) -> None:
    program, examples = world[0].copy(), world[1]
    factorize(program, examples, ratio=0.6, whiten=True)
    context = Context(0, 1, tmp_path, examples, lambda *_, **__: None)
    before = {name: value.detach().clone() for name, value in program.module.named_parameters()}
    finetune.run(program, Finetune(kind="finetune", epochs=1, max_steps=4, keep_best=False), context)
    factors = [name for name in before if name.endswith(("first.weight", "last.weight", "second.weight"))]
    assert factors
    assert all(not torch.equal(program.module.get_parameter(name), before[name]) for name in factors)
    prune_magnitude.run(program, PruneMagnitude(kind="prune_magnitude", sparsity=0.3), context)
    assert set(factors) <= program.masks.keys()
    (inputs,) = program.example_inputs(6, seed=2)
    with torch.no_grad():
        (expected,) = program.module.eval()(inputs)
    result = quantize_int8.run(program, QuantizeInt8(kind="quantize_int8"), context).program
    assert isinstance(result, FileProgram)
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    assert functional.cosine_similarity(torch.from_numpy(found), expected).min() > 0.99


def test_skipped_and_pruned_layers_stay_whole(world: World) -> None:
    program = world[0].copy()
    first, second, *_ = inspect(program).layers
    pruned = program.module.get_submodule(second)
    program.masks[f"{second}.weight"] = torch.ones_like(
        program.module.get_parameter(f"{second}.weight"), dtype=torch.bool
    )
    kept = program.module.get_submodule(first)
    outcome = factorize(program, skip_layers=[first])
    assert program.module.get_submodule(first) is kept
    assert program.module.get_submodule(second) is pruned
    assert any(second in warning and "pruned" in warning for warning in outcome.warnings)


def test_budget_counts_all_layers_together(world: World) -> None:
    program = world[0].copy()
    names = inspect(program).layers
    total = sum(program.module.get_parameter(f"{name}.weight").numel() for name in names)
    others = size(program) - total
    factorize(program, rank_by="budget", budget=0.4)
    assert 0.35 * total < size(program) - others <= 0.4 * total


def test_no_layer_grows_and_none_left_is_an_error(world: World) -> None:
    with pytest.raises(StepFailed) as caught:
        factorize(world[0].copy(), rank_by="rank", rank=4096)
    assert caught.value.code == "nothing_to_factorize"
    assert caught.value.fix.startswith("Lower rank,")
    with pytest.raises(RecipeRefused, match="nope"):
        factorize(world[0].copy(), skip_layers=["nope"])
