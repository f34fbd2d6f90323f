"""Structured pruning on every family of models: really smaller, provably the same function of what is left."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from app.recipes.data import Data
from tests.engine.techniques.pruning_models import load, load_module, prune, pruned, size
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.pruning.groups import ChannelGroup, find_channels
from worker.engine.pruning.ranking import Criterion, choose_units, measure_weights, score_units
from worker.engine.pruning.removal import find_sound_channels, remove_channels
from worker.engine.techniques.prune_structured import inspect
from worker.engine.training.examples import open_examples

ID = "dst_" + "a" * 26
FAMILIES = [
    *((name, True) for name in ("cnn", "resnet20", "mobilenet", "unet", "vit", "mlp", "two_tower")),
    *((name, False) for name in ("gpt", "gru_deep", "lstm")),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "dynamic"), FAMILIES)
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
    assert len(outcome.sensitivity) == outcome.facts["groups_pruned"]
    # The least important go: half of the channels have less than half of the importance, but never none of it.
    assert all(each.metric == "importance_lost" and 0 < each.effect < 0.5 for each in outcome.sensitivity)
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
    "vit": {"blocks.0.attention.qkv", "blocks.0.mlp.0", "blocks.1.attention.qkv", "blocks.1.mlp.0", "patch"},
    "gpt": {"blocks.0.attention.qkv", "blocks.1.mlp.0", "tokens"},
    "lstm": {"embedding", "rnn"},
    "encoder_decoder": {"blocks.layers.0.self_attn.in_proj", "decoder.multihead_attn.in_proj_kv", "decoder.linear1"},
}


@pytest.mark.parametrize("name", EXPECTED_LAYERS)
def test_capability_names_the_layers_and_why_others_are_kept(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path, dynamic=name not in ("gpt", "lstm"))
    state = {key: value.clone() for key, value in program.module.state_dict().items()}
    capability = inspect(program)
    assert capability.applicable
    assert set(capability.layers) >= EXPECTED_LAYERS[name]
    assert capability.missing is not None
    assert "output of the model" in capability.missing
    assert all(torch.equal(value, state[key]) for key, value in program.module.state_dict().items())


@pytest.mark.parametrize("name", ["lstm", "gru_deep"])
def test_hidden_units_of_recurrent_layers_go_in_every_gate_layer_and_direction(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path, dynamic=False)
    channels = find_channels(program)
    gone = [1, 5, 6]
    small = remove_channels(program, channels, {"rnn": np.array(gone)}).program
    rnn, whole = small.module.get_submodule("rnn"), program.module.get_submodule("rnn")
    assert isinstance(rnn, nn.RNNBase)
    assert isinstance(whole, nn.RNNBase)
    assert rnn.hidden_size == 13
    with torch.no_grad():
        # A unit whose every weight is zero computes zero, and what reads it adds nothing.
        for parameter_name, parameter in whole.named_parameters():
            parameter.unflatten(0, (-1, 16))[:, gone] = 0
            if parameter_name.startswith("weight_hh"):
                parameter[:, gone] = 0
    inputs = program.example_inputs(4, seed=2)
    torch.testing.assert_close(small.module.eval()(*inputs), program.module.eval()(*inputs), atol=1e-5, rtol=1e-4)


def make_group(name: str, num_units: int, unit_size: int) -> ChannelGroup:
    roots = np.arange(num_units, dtype=np.int64)
    return ChannelGroup(name, "channels", roots, unit_size, (unit_size,), (), (name,))


@given(
    counts=st.lists(st.integers(2, 70), min_size=1, max_size=4), ratio=st.floats(0.01, 0.94),
    round_to=st.sampled_from([1, 2, 8, 16]), scope=st.sampled_from(["local", "global"]),
    size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_counts_are_rounded_and_the_weakest_go(
    counts: list[int], ratio: float, round_to: int, scope: Literal["local", "global"], size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = [make_group(f"layer{i}", n, size) for i, n in enumerate(counts)]
    scores = [rng.random(n) for n in counts]
    chosen = choose_units(groups, scores, ratio=ratio, scope=scope, round_to=round_to)
    for group, score in zip(groups, scores, strict=True):
        if group.name not in chosen:
            continue
        gone = np.isin(np.arange(group.num_units), chosen[group.name])
        kept = int((~gone).sum()) * size
        assert kept > 0
        assert kept % round_to == 0
        assert score[gone].max() <= score[~gone].min()
        step = int(np.lcm(size, round_to))
        if scope == "local" and kept > step:
            assert abs(kept - (1 - ratio) * group.num_channels) <= step / 2 + 1e-6
    if scope == "global" and round_to == 1:
        total = sum(group.num_channels for group in groups)
        removed = sum(len(gone) * size for gone in chosen.values())
        assert removed <= ratio * total + 1e-6


@pytest.mark.parametrize("round_to", [1, 8])
def test_round_to_is_respected_in_the_model(round_to: int, tmp_path: Path) -> None:
    small = pruned(prune(load("mobilenet", tmp_path), ratio=0.3, round_to=round_to))
    widths = {layer.out_channels for layer in small.module.modules() if isinstance(layer, nn.Conv2d)}
    assert all(width % round_to == 0 for width in widths)
    assert max(widths) < 96


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_same_seed_gives_the_same_bytes(scope: str, tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        small = pruned(prune(load("cnn", tmp_path), scope=scope))
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
    program = load("mobilenet", tmp_path)
    with torch.no_grad():
        for group in find_channels(program).groups:
            for place in group.places:
                if place.roles & {"out", "scale"} and "running" not in place.parameter:
                    parameter = program.module.get_parameter(place.parameter)
                    parameter[place.positions[place.units % 2 == 0]] = 0
    inputs = program.example_inputs(4, seed=5)
    expected = program.module.eval()(*inputs)[0]
    small = pruned(prune(program, ratio=0.5, round_to=1, structures=["channels", "width"]))
    assert size(small) < size(program) / 2
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
    channels = find_sound_channels(program)
    units = {
        group.name: next(
            p.positions[p.units == 0].tolist() for p in group.places if p.parameter == f"{group.name}.bias"
        )
        for group in channels.groups
    }
    assert units["q"] == [0, 1, 2, 3, 4, 5]
    assert units["stem"] == [0, 4, 8, 12]
    assert units["to_norm"] == [0, 1, 2, 3]
    whole = program.module.eval()(*inputs)[0]
    small = pruned(prune(program, ratio=0.5))
    norm, grouped, q = (small.module.get_submodule(name) for name in ("norm", "grouped", "q"))
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (4, 16)
    assert isinstance(grouped, nn.Conv2d)
    assert (grouped.in_channels, grouped.groups) == (8, 4)
    assert isinstance(q, nn.Linear)
    assert q.out_features == 12
    assert small.module.eval()(*inputs)[0].shape == whole.shape


class Shuffle(nn.Module):
    """A channel shuffle, then a sort of the channels, which no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 4, channels // 4, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        x = torch.relu(self.second(torch.relu(x))).sort(1).values
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


def test_a_shuffle_is_followed_and_what_is_not_understood_is_left_alone(tmp_path: Path) -> None:
    program = load_module(Shuffle(), (torch.randn(2, 3, 4, 4),), tmp_path)
    channels = find_sound_channels(program)
    assert [(group.name, group.num_units) for group in channels.groups] == [("first", 4), ("third", 8)]
    assert any("second" in each.layers and "sort" in each.reason for each in channels.left)
    small = dict(pruned(prune(program, ratio=0.5)).module.named_modules())
    widths = {name: layer.out_channels for name, layer in small.items() if isinstance(layer, nn.Conv2d)}
    assert widths == {"first": 8, "second": 16, "third": 4}


class WrongRule(nn.Module):
    """Its scale depends on the width, so a smaller model computes something else: the proof must notice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        return self.head(torch.relu(x))


def test_the_proof_rejects_what_a_wrong_rule_would_allow(tmp_path: Path) -> None:
    program = load_module(WrongRule(), (torch.randn(2, 3, 4, 4),), tmp_path)
    channels = find_channels(program)
    (place,) = (p for g in channels.groups for p in g.places if p.parameter == "second.weight" and p.axis == 1)
    assert place.roles == {"in"}
    # As if a rule had said that the second convolution only scales these channels.
    channels.flow.roles[("second.weight", 1)] = {"scale"}
    removal = remove_channels(program, channels, {"first": np.array([0, 3])})
    assert removal.removed == {}
    assert "of its norm" in removal.left[0].reason


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
    channels = find_channels(program)
    rng = np.random.default_rng(0)
    for _ in range(3):
        chosen = {g.name: np.sort(rng.permutation(g.num_units)[: g.num_units // 3]) for g in channels.groups}
        removal = remove_channels(program, channels, chosen)
        assert removal.removed == {name: len(units) for name, units in chosen.items()}


def test_group_norm_sums_over_every_layer_of_a_group(tmp_path: Path) -> None:
    program = load_module(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        (torch.randn(2, 3, 2, 2),),
        tmp_path,
    )
    (group,) = find_channels(program).groups
    scores = score_units(group, "group_norm", measure_weights(program.module, "group_norm"), program.module)
    assert scores is not None
    conv = program.module.get_parameter("0.weight").detach().square().sum((1, 2, 3)).double()
    # The bias does not count: a channel that its ReLU always silences has a large one, below zero.
    fc = program.module.get_parameter("3.weight").detach().square().view(2, 4, 4).sum((0, 2)).double()
    expected = torch.stack([part / part.mean() for part in (conv, fc)]).sum(0)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5)


def test_each_criterion_orders_the_channels_by_its_own_measure(tmp_path: Path) -> None:
    made, norm, read = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    module = nn.Sequential(made, norm, nn.ReLU(), read)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
        norm.weight.copy_(torch.tensor([2.0, 4, 1, 3]))
        read.weight.copy_(torch.tensor([90.0, 40, 30, 2]).view(1, 4, 1, 1).expand(2, 4, 1, 1))
    program = load_module(module, (torch.randn(2, 3, 2, 2),), tmp_path)
    (group,) = find_channels(program).groups
    orders = {}
    criteria: tuple[Criterion, ...] = ("magnitude", "batch_norm_scale", "group_norm")
    for criterion in criteria:
        scores = score_units(group, criterion, measure_weights(program.module, criterion), program.module)
        assert scores is not None
        orders[criterion] = np.argsort(scores).tolist()
    assert orders == {
        "magnitude": [0, 1, 2, 3], "batch_norm_scale": [2, 0, 3, 1], "group_norm": [2, 1, 3, 0],
    }  # fmt: skip


def test_batch_norm_scale_leaves_layers_without_batch_norm_and_says_so(tmp_path: Path) -> None:
    outcome = prune(load("cnn", tmp_path), criterion="batch_norm_scale")
    fc1 = pruned(outcome).module.get_submodule("fc1")
    assert isinstance(fc1, nn.Linear)
    assert fc1.out_features == 32
    assert any("fc1: no batch norm follows" in warning for warning in outcome.warnings)
    with pytest.raises(StepFailed, match="no batch norm follows"):
        prune(load("gpt", tmp_path, dynamic=False), criterion="batch_norm_scale")
