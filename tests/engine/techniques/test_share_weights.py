"""Weight sharing: few distinct values, exact zeros, no more error with more bits, and centroids that train as one."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from app.recipes.data import Data
from app.recipes.facts import TensorFacts
from app.recipes.sharing import ShareWeights
from tests.engine.digits import DATASET_ID, Convolutions, Uploads, make_uploads
from tests.engine.techniques.test_prune_magnitude import make
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.packing.encodings import Codebook
from worker.engine.packing.tensors import packed_bytes
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program, Signature
from worker.engine.sharing.clusters import Initialization, find_clusters
from worker.engine.sharing.codebooks import SharedWeights, share
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.share_weights import inspect, run
from worker.engine.training.examples import BoundExamples, open_examples

torch.set_num_threads(1)
INITIALIZATIONS: tuple[Initialization, ...] = ("linear", "density", "quantile")
QUICK = settings(max_examples=40, deadline=None)


def step(program: Program, examples: BoundExamples | None = None, **spec: Any) -> Outcome:
    context = Context(0, 1, Path(), examples, lambda *_, **__: None)
    return run(program, ShareWeights.model_validate({"kind": "share_weights", **spec}), context)


def codebooks(program: Program) -> dict[str, Codebook]:
    return {name: each for name, each in program.encodings.items() if isinstance(each, Codebook)}


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.sampled_from([(1, 1), (1, 9), (6, 5), (8, 3, 3, 3), (40, 30)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(shape, generator=generator) ** draw(st.sampled_from([1, 3]))
    weight = weight * (torch.rand(shape, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 1.0])))
    return (weight * 4).round() / 4 if draw(st.booleans()) else weight


@given(weights(), st.sampled_from(INITIALIZATIONS), st.none() | st.integers(1, 9), st.sampled_from([1, 2, 100]))
@QUICK
def test_more_bits_never_mean_more_error(
    weight: torch.Tensor, start: Initialization, rows: int | None, iterations: int
) -> None:
    errors = []
    for bits in range(1, 9):
        shared = share(weight, 2**bits, rows, start, iterations)
        decoded = shared.decode()
        assert decoded.shape == weight.shape
        assert not decoded[weight == 0].any()
        for block, values in zip(shared.centroids, decoded.split(shared.rows_per_codebook), strict=True):
            assert len(values.unique()) <= len(block) <= 2**bits
        errors.append(float((decoded - weight).double().square().sum()))
    # Centroids are stored as 32-bit floats, which rounds them by up to 2 ** -24 of their size.
    slack = 1e-6 * float(weight.double().square().sum())
    assert all(more <= fewer + slack for fewer, more in itertools.pairwise(errors))


@given(
    st.lists(st.integers(-999, 999).map(lambda i: i / 8), min_size=1, max_size=60),
    st.integers(1, 20), st.sampled_from(INITIALIZATIONS)
)  # fmt: skip
@QUICK
def test_clusters_are_full_and_their_error_is_that_of_the_nearest(
    values: list[float], count: int, start: Initialization
) -> None:
    found = find_clusters(np.array(values), count, start)
    nearest = np.abs(np.array(values)[:, None] - found.centroids).argmin(1)
    assert len(found.centroids) == min(count, len(set(np.array(values))))
    assert set(nearest) == set(range(len(found.centroids)))
    error = float(((np.array(values) - found.centroids[nearest]) ** 2).sum())
    assert error <= found.squared_error + 1e-6 * (1 + np.square(values).sum())


def test_values_too_close_for_a_middle_end_too() -> None:
    values = np.array([1.0, np.nextafter(1.0, 2), np.nextafter(1.0, 0), 0.0, 5e-324])
    for count in range(1, 7):
        assert 1 <= len(find_clusters(values, count).centroids) <= count


def test_well_separated_values_are_found_exactly() -> None:
    rng = np.random.default_rng(0)
    middles = np.array([-3.0, -1.0, 0.5, 4.0])
    values = np.concatenate([middle + rng.normal(0, 0.01, 100) for middle in middles])
    for start in INITIALIZATIONS:
        found = find_clusters(values, 4, start)
        np.testing.assert_allclose(found.centroids, values.reshape(4, 100).mean(1))


def test_a_start_that_ends_badly_is_not_the_only_one() -> None:
    # From the density of these values, eight clusters end at more than seven times the error of four.
    values = np.array(
        [-5.74, -5.09, -3.18, -3.16, -2.93, -2.3, -1.74, -1.27, -0.79, -0.57, -0.54, -0.37, -0.28, -0.12, -0.09, 0.14,
         0.27, 0.43, 0.45, 0.63, 1.47, 1.79, 1.8, 15.88, 34.66]
    )  # fmt: skip
    for start in INITIALIZATIONS:
        four, eight = (find_clusters(values, count, start).squared_error for count in (4, 8))
        assert eight < 0.1 * four


def test_clusters_are_better_than_the_grid_they_start_from() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for start in INITIALIZATIONS:
        one = share(weight, 16, None, start, 1)
        many = share(weight, 16, None, start, 100)
        errors = [float((each.decode() - weight).square().mean()) for each in (one, many)]
        assert errors[1] <= errors[0]
        # The best 16 levels have 0.009497, the best evenly spaced ones 0.01154 (Max 1960); Lloyd finds a local optimum.
        assert errors[1] < 0.0120


def test_every_kind_of_layer_is_shared_and_counted() -> None:
    program = make()
    before = {name: value.detach().clone() for name, value in program.module.named_parameters()}
    outcome = step(program, bits=2)
    assert set(program.encodings) == {"embedding.weight", "conv.weight", "fc.weight"}
    for name, each in program.encodings.items():
        parameter = program.module.get_parameter(name)
        assert torch.equal(parameter, each.decode())
        assert len(parameter.unique()) <= 4
    for name in ("conv.bias", "norm.weight"):
        assert torch.equal(program.module.get_parameter(name), before[name])
    assert outcome.facts["packed_bytes"] == sum(packed_bytes(each) for each in program.encodings.values())
    error = sum(float((program.module.get_parameter(n).detach() - before[n]).square().sum()) for n in program.encodings)
    assert outcome.facts["mean_squared_error"] == pytest.approx(error / (42 + 90 + 30))
    assert outcome.facts["weights_shared"] == 162
    assert {each.layer for each in outcome.sensitivity} == {"embedding", "conv", "fc"}
    assert any("dense model" in warning for warning in outcome.warnings)


def test_pruned_weights_stay_zero_in_a_cluster_of_their_own() -> None:
    program = make()
    weight = program.module.get_parameter("conv.weight")
    program.masks["conv.weight"] = weight.detach().abs() > 0.1
    program.apply_masks()
    step(program, bits=2, skip_layers=["embedding", "fc"])
    codebook = codebooks(program)["conv.weight"]
    assert torch.equal(weight == 0, ~program.masks["conv.weight"])
    assert torch.equal(codebook.indices == 0, ~program.masks["conv.weight"])
    assert len(weight.unique()) == 4


def test_rows_can_have_codebooks_of_their_own() -> None:
    program = make()
    outcome = step(program, num_clusters=3, rows_per_codebook=2, skip_layers=["embedding"])
    assert codebooks(program)["conv.weight"].centroids.shape == (3, 3)
    assert outcome.facts["codebooks"] == 6


def test_embeddings_skips_and_earlier_encodings_are_left_alone() -> None:
    program = make()
    outcome = step(program, bits=2, include_embeddings=False, skip_layers=["conv"])
    assert set(program.encodings) == {"fc.weight"}
    assert any("embedding" in warning for warning in outcome.warnings)
    coded = program.encodings["fc.weight"]
    outcome = step(program, bits=1)
    assert program.encodings["fc.weight"] is coded
    assert outcome.facts["coded_before"] == 1
    with pytest.raises(StepFailed) as caught:
        step(program)
    assert caught.value.code == "nothing_to_share"
    assert "the earlier one" in caught.value.fix
    with pytest.raises(RecipeRefused, match="nope"):
        step(make(), skip_layers=["nope"])


def test_recurrent_layers_are_shared() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.rnn(x)[0],)

    facts = TensorFacts(name="x", dtype="float32", shape=("batch", 4, 8))
    program = Program(fx.symbolic_trace(Small()), Signature((facts,), (facts,), None), "eval")
    assert inspect(program).layers == ("rnn",)
    step(program, bits=3)
    assert set(program.encodings) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return make_uploads(Convolutions(), tmp_path_factory.mktemp("digits"))


def bind(uploads: Uploads, directory: Path) -> tuple[Program, BoundExamples]:
    directory.mkdir(exist_ok=True)
    program = open_program(uploads.model, directory)
    data = Data.model_validate(uploads.fields([])["recipe"]["data"])
    return program, open_examples(data, {DATASET_ID: (uploads.data, "npz")}, program.signature, 0, directory)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_centroids_are_trained_and_weights_stay_in_their_cluster(
    digits: Uploads, tmp_path: Path, optimizer: str
) -> None:
    program, examples = bind(digits, tmp_path)
    weight = program.module.get_parameter("second.0.weight")
    program.masks["second.0.weight"] = weight.detach().abs() > weight.detach().abs().median()
    program.apply_masks()
    hidden = program.module.get_parameter("hidden.weight")
    step(program, bits=3, skip_layers=["first.0", "second.0", "classifier"])
    coded = hidden.detach().clone()

    untrained = program.copy()
    step(untrained, bits=2)
    training = {"epochs": 2, "optimizer": optimizer, "learning_rate": 0.01, "keep_best": False}
    outcome = step(program, examples, bits=2, training=training)

    assert torch.equal(hidden, coded)
    for name in ("first.0.weight", "second.0.weight", "classifier.weight"):
        before, after = codebooks(untrained)[name], codebooks(program)[name]
        assert torch.equal(before.indices, after.indices)
        assert not torch.equal(before.centroids, after.centroids)
        assert torch.equal(program.module.get_parameter(name), after.decode())
        assert len(program.module.get_parameter(name).unique()) <= 4
    assert torch.equal(weight == 0, ~program.masks["second.0.weight"])
    assert outcome.facts["quality_after"] >= outcome.facts["quality_before"]  # type: ignore[operator]


def test_the_best_epoch_is_what_is_encoded(digits: Uploads, tmp_path: Path) -> None:
    program, examples = bind(digits, tmp_path)
    # Far too fast: the start is the best, and must be what parameters and encodings hold.
    outcome = step(program, examples, bits=4, training={"epochs": 1, "learning_rate": 5.0, "gradient_clip_norm": None})
    assert outcome.facts["best_epoch"] == 0
    for name, each in program.encodings.items():
        assert torch.equal(program.module.get_parameter(name), each.decode())


def test_a_weight_gets_the_mean_gradient_of_its_cluster_and_the_value_of_the_first() -> None:
    program = make()
    weight = program.module.get_parameter("conv.weight")
    program.masks["conv.weight"] = weight.detach().abs() > 0.1
    program.apply_masks()
    step(program, bits=2, rows_per_codebook=3, skip_layers=["embedding", "fc"])
    codebook = codebooks(program)["conv.weight"]
    step(program, bits=2, skip_layers=["embedding"])
    coded = program.module.get_parameter("fc.weight")
    values = coded.detach().clone()
    shared = SharedWeights(program, {"conv.weight": codebook})
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad, coded.grad = gradient.clone(), torch.ones_like(coded)
    shared.limit_gradients()
    with torch.no_grad():
        weight.add_(torch.arange(weight.numel()).view_as(weight) * 1e-3)
        coded.add_(1.0)
        moved = weight.detach().clone()
        shared.restore()
    assert coded.grad is None
    assert torch.equal(coded, values)
    for rows in (slice(0, 3), slice(3, 5)):
        for cluster in codebook.indices[rows].unique():
            inside = codebook.indices[rows] == cluster
            expected = torch.zeros(()) if cluster == 0 else gradient[rows][inside].mean()
            torch.testing.assert_close(weight.grad[rows][inside], expected.expand(int(inside.sum())))
            first = torch.zeros(()) if cluster == 0 else moved[rows][inside][0]
            assert torch.equal(weight[rows][inside], first.expand(int(inside.sum())))
    shared.encode(program)
    assert torch.equal(weight, program.encodings["conv.weight"].decode())
