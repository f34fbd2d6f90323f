"""Structured pruning on every family of models: really smaller, provably the same function of what is left."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from app.recipes.data import Data
from app.recipes.pruning import PruneStructured
from tests.engine.zoo import export_model
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import ChannelGroup, find_channels
from worker.engine.pruning.ranking import choose_channels, measure_magnitude, score_units
from worker.engine.pruning.removal import find_sound_channels, remove_channels
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.prune_structured import inspect, run
from worker.engine.training.examples import BoundExamples, open_examples

ID = "dst_" + "a" * 26
OPENED: dict[tuple[object, ...], Program] = {}
"""Exporting takes longer than pruning, so each model is exported once."""
FAMILIES = ["cnn", "resnet20", "mobilenet", "unet", "vit", "gpt", "mlp"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, directory: Path, **options: Any) -> Program:
    key = (name, *options.items())
    if key not in OPENED:
        export_model(name, directory / f"{name}.pt2", **options)
        (directory / "work").mkdir(exist_ok=True)
        OPENED[key] = open_program(directory / f"{name}.pt2", directory / "work")
    return OPENED[key].copy()


def load_module(module: nn.Module, inputs: tuple[Tensor, ...], directory: Path) -> Program:
    torch.manual_seed(0)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes), directory / "module.pt2")
    (directory / "work").mkdir(exist_ok=True)
    return open_program(directory / "module.pt2", directory / "work")


def prune(program: Program, examples: BoundExamples | None = None, **spec: Any) -> Outcome:
    context = Context(0, 1, Path(), examples, lambda *_, **__: None)
    return run(program, PruneStructured.model_validate({"kind": "prune_structured", "round_to": 2, **spec}), context)


def pruned(outcome: Outcome) -> Program:
    assert isinstance(outcome.program, Program)
    return outcome.program


def size(program: Program) -> int:
    return sum(parameter.numel() for parameter in program.module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_every_family_gets_smaller_and_keeps_its_outputs_form(name: str, dynamic: bool, tmp_path: Path) -> None:
    program = load(name, tmp_path, dynamic=dynamic)
    before, macs = size(program), count_macs(program).total
    batch = program.signature.batch_size or 3
    inputs = program.example_inputs(batch, seed=1)
    shapes = [output.shape for output in program.module(*inputs)]

    outcome = prune(program)

    small = pruned(outcome)
    assert outcome.facts["parameters_before"] == before
    assert outcome.facts["parameters_after"] == size(small) < before
    assert count_macs(small).total < macs
    outputs = small.module(*inputs)
    assert [output.shape for output in outputs] == shapes
    assert all(bool(torch.isfinite(output).all()) for output in outputs)
    small.module.train()
    sum(output.float().square().mean() for output in small.module(*inputs)).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.module.parameters())
    for names in program.tied:
        parameters = dict(small.module.named_parameters(remove_duplicate=False))
        assert len({id(parameters[each]) for each in names}) == 1


EXPECTED_LAYERS = {
    "cnn": {"features.0", "features.4", "fc1"},
    "mobilenet": {"stem.0", "blocks.0.conv.0", "blocks.0.conv.3", "blocks.0.conv.6", "blocks.1.conv.6"},
    "vit": {"blocks.0.mlp.0", "blocks.1.mlp.0"},
    "gpt": {"blocks.0.mlp.0", "blocks.1.mlp.0"},
}


@pytest.mark.parametrize("name", EXPECTED_LAYERS)
def test_capability_names_the_layers_and_why_others_are_kept(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path)
    state = {key: value.clone() for key, value in program.module.state_dict().items()}
    capability = inspect(program)
    assert capability.applicable
    assert set(capability.layers) >= EXPECTED_LAYERS[name]
    assert capability.missing is not None
    assert "output of the model" in capability.missing or "shares its weight" in capability.missing
    assert all(torch.equal(value, state[key]) for key, value in program.module.state_dict().items())


# torch.export swaps the flat weight list of recurrent layers while it traces.
@pytest.mark.filterwarnings("ignore:The tensor attributes? .* assigned during export:UserWarning")
def test_recurrent_layers_keep_their_width_and_it_is_said(tmp_path: Path) -> None:
    program = load("gru", tmp_path)
    capability = inspect(program)
    assert not capability.applicable
    assert capability.missing is not None
    assert "recurrent layers keep their width: rnn" in capability.missing
    with pytest.raises(StepFailed) as caught:
        prune(program)
    assert caught.value.code == "nothing_to_prune"


@given(
    counts=st.lists(st.integers(2, 70), min_size=1, max_size=4), ratio=st.floats(0.01, 0.94),
    round_to=st.sampled_from([1, 2, 8, 16]), scope=st.sampled_from(["local", "global"]),
    size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_counts_are_rounded_and_the_weakest_go(
    counts: list[int], ratio: float, round_to: int, scope: str, size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    root = nn.Identity()
    groups = [
        ChannelGroup(root, f"layer{i}", n * size, np.arange(n * size).reshape(n, size), ())
        for i, n in enumerate(counts)
    ]
    scores = [rng.random(n) for n in counts]
    chosen = choose_channels(groups, scores, ratio=ratio, scope=scope, round_to=round_to)
    for group, score in zip(groups, scores, strict=True):
        if group.root_name not in chosen:
            continue
        gone = chosen[group.root_name]
        kept = group.num_channels - len(gone)
        assert kept > 0
        assert kept % round_to == 0
        assert kept % size == 0
        units = np.isin(group.units[:, 0], gone)
        assert np.array_equal(np.sort(group.units[units].ravel()), gone)
        assert score[units].max() <= score[~units].min()
        if scope == "local" and kept > np.lcm(size, round_to):
            assert abs(kept - (1 - ratio) * group.num_channels) <= np.lcm(size, round_to) / 2 + 1e-6
    if scope == "global" and round_to == 1:
        total = sum(group.num_channels for group in groups)
        removed = sum(len(gone) for gone in chosen.values())
        assert removed <= ratio * total + 1e-6


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_round_to_is_respected_in_the_model(round_to: int, tmp_path: Path) -> None:
    small = pruned(prune(load("resnet20", tmp_path), ratio=0.3, round_to=round_to))
    widths = {layer.out_channels for layer in small.module.modules() if isinstance(layer, nn.Conv2d)}
    assert all(width % round_to == 0 for width in widths)
    assert max(widths) < 64


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_same_seed_gives_the_same_bytes(scope: str, tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        small = pruned(prune(load("resnet20", tmp_path), scope=scope))
        states.append({name: tensor.numpy().tobytes() for name, tensor in small.module.state_dict().items()})
    assert states[0] == states[1]


def test_global_scope_takes_more_from_a_weak_layer_than_local_scope_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 16), nn.Linear(16, 16)
    module = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for rows in (first.weight[4:], first.bias[4:], second.weight[:, 4:]):
            rows.mul_(0.01)
    widths = {}
    for scope in ("local", "global"):
        program = load_module(module, (torch.randn(4, 8),), tmp_path)
        small = pruned(prune(program, ratio=0.25, round_to=1, scope=scope))
        layers = [layer for layer in small.module.modules() if isinstance(layer, nn.Linear)]
        widths[scope] = [layer.out_features for layer in layers[:2]]
    assert widths["local"] == [12, 12]
    assert widths["global"] == [8, 16]


def test_channels_that_do_nothing_go_first_and_the_function_stays(tmp_path: Path) -> None:
    program = load("resnet20", tmp_path)
    channels = find_channels(program, program.example_inputs(2))
    dead: dict[str, set[int]] = {}
    with torch.no_grad():
        for group in channels.groups:
            dead[group.root_name] = set(range(0, group.num_channels, 2))
            for slot in group.slots:
                for name in ("weight", "bias"):
                    value = getattr(slot.layer, name)
                    if value is not None and not slot.is_input:
                        value[::2] = 0
    inputs = program.example_inputs(4, seed=5)
    expected = program.module.eval()(*inputs)[0]
    small = pruned(prune(program, ratio=0.5, round_to=1))
    assert size(small) < size(program) / 3
    torch.testing.assert_close(small.module.eval()(*inputs)[0], expected, atol=1e-4, rtol=1e-3)


def test_skipped_layers_and_what_hangs_on_them_keep_their_width(tmp_path: Path) -> None:
    program = load("resnet20", tmp_path)
    outcome = prune(program, skip_layers=["conv1", "blocks.4.conv1"])
    small = dict(pruned(outcome).module.named_modules())
    for name in ("conv1", "blocks.0.conv2", "blocks.2.conv2", "blocks.4.conv1"):
        before, after = program.module.get_submodule(name), small[name]
        assert isinstance(before, nn.Conv2d)
        assert isinstance(after, nn.Conv2d)
        assert after.out_channels == before.out_channels
    narrower = small["blocks.0.conv1"]
    assert isinstance(narrower, nn.Conv2d)
    assert narrower.out_channels == 8
    assert any("is in skip_layers" in warning for warning in outcome.warnings)


def test_a_ratio_that_rounding_undoes_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"round_to 256 .* \[16, 32, 64\]") as caught:
        prune(load("resnet20", tmp_path), ratio=0.5, round_to=256)
    assert "round_to" in caught.value.fix
    with pytest.raises(RecipeRefused, match="nope"):
        prune(load("cnn", tmp_path), skip_layers=["nope"])


class Special(nn.Module):
    """Grouped convolution, squeeze and excitation, group norm, separate attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 32, 3, 1, 1, groups=4)
        self.squeeze, self.excite = nn.Linear(32, 16), nn.Linear(16, 32)
        self.to_norm, self.norm, self.after = nn.Conv2d(32, 32, 1), nn.GroupNorm(8, 32), nn.Conv2d(32, 24, 1)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        x = self.after(torch.relu(self.norm(self.to_norm(x)))).flatten(2).transpose(1, 2)
        batch, length, width = x.shape
        q, k, v = (f(x).view(batch, length, 4, width // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.head((x + self.o(y)).mean(1))


def test_whole_heads_norm_groups_and_even_conv_groups(tmp_path: Path) -> None:
    program = load_module(Special(), (torch.randn(2, 3, 8, 8),), tmp_path)
    inputs = program.example_inputs(2)
    channels = find_sound_channels(program, inputs)
    units = {group.root_name: group.units.tolist()[0] for group in channels.groups}
    assert units["q"] == [0, 1, 2, 3, 4, 5]
    assert units["stem"] == [0, 4, 8, 12]
    assert units["to_norm"] == [0, 1, 2, 3]
    small = pruned(prune(program, ratio=0.5))
    norm, grouped, q = (small.module.get_submodule(name) for name in ("norm", "grouped", "q"))
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (4, 16)
    assert isinstance(grouped, nn.Conv2d)
    assert (grouped.in_channels, grouped.groups) == (8, 4)
    assert isinstance(q, nn.Linear)
    assert q.out_features == 12


class Shuffle(nn.Module):
    """A channel shuffle, which torch-pruning does not follow: the proof must notice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 4, channels // 4, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(torch.relu(self.second(torch.relu(x))).mean((2, 3)))


def test_a_group_that_was_not_understood_is_left_alone(tmp_path: Path) -> None:
    program = load_module(Shuffle(), (torch.randn(2, 3, 4, 4),), tmp_path)
    channels = find_sound_channels(program, program.example_inputs(2))
    assert [group.root_name for group in channels.groups] == ["second"]
    assert any("first" in each.layers for each in channels.left)
    small = pruned(prune(program, ratio=0.5))
    assert isinstance(first := small.module.get_submodule("first"), nn.Conv2d)
    assert first.out_channels == 16


def test_taylor_removes_what_the_loss_does_not_need(tmp_path: Path) -> None:
    program = load("mlp", tmp_path)
    with torch.no_grad():
        # Large weights that the loss cannot see: magnitude would keep them, Taylor must not.
        program.module.get_parameter("body.0.weight")[:32] *= 10
        program.module.get_parameter("body.3.weight")[:32] *= 100
        program.module.get_parameter("head.weight")[:, :32] = 0
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(64, 16)).astype(np.float32), y=rng.integers(0, 4, 64))
    name = program.signature.inputs[0].name
    data = Data.model_validate(
        {"dataset_id": ID, "task": "classification", "label_column": "y", "inputs": {name: {"column": "x"}}}
    )
    examples = open_examples(data, {ID: (tmp_path / "data.npz", "npz")}, program.signature, 0, tmp_path)
    inputs = program.example_inputs(8, seed=3)
    expected = program.module(*inputs)[0]
    outcome = prune(program.copy(), examples, criterion="taylor", skip_layers=["body.0"], batch_size=16)
    torch.testing.assert_close(pruned(outcome).module(*inputs)[0], expected, atol=1e-4, rtol=1e-3)
    other = prune(program.copy(), examples, criterion="magnitude", skip_layers=["body.0"])
    assert not torch.allclose(pruned(other).module(*inputs)[0], expected, atol=1e-2)


def test_removal_is_proven_for_arbitrary_channels(tmp_path: Path) -> None:
    program = load("mobilenet", tmp_path)
    inputs = program.example_inputs(2)
    channels = find_channels(program, inputs)
    rng = np.random.default_rng(0)
    for _ in range(5):
        chosen = {
            group.root_name: np.sort(group.units[rng.permutation(len(group.units))[: len(group.units) // 3]].ravel())
            for group in channels.groups
        }
        removal = remove_channels(program, chosen, inputs)
        assert removal.removed == {root: len(gone) for root, gone in chosen.items()}


def test_scores_sum_over_every_layer_of_a_group(tmp_path: Path) -> None:
    program = load_module(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        (torch.randn(2, 3, 2, 2),),
        tmp_path,
    )
    (group,) = find_channels(program, program.example_inputs(2)).groups
    scores = score_units(group, measure_magnitude(program.module))
    conv = program.module.get_parameter("0.weight").detach().square().sum((1, 2, 3)).double()
    bias = program.module.get_parameter("0.bias").detach().square().double()
    fc = program.module.get_parameter("3.weight").detach().square().view(2, 4, 4).sum((0, 2)).double()
    expected = sum(part / part.mean() for part in (conv, bias, fc))
    assert isinstance(expected, Tensor)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5)
