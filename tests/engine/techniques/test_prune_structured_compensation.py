"""Layers that read removed channels lean on those that stay; and the streams that residual blocks add to stay whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.recipes.pruning import PruneStructured
from app.recipes.training import TrainingSettings
from tests.engine.techniques.learning import digit_examples, make_cnn, random_examples
from tests.engine.techniques.pruning_models import load, load_module, prune, pruned
from worker.engine.programs.program import Program
from worker.engine.pruning.compensation import compensate, lean_on
from worker.engine.pruning.removal import find_sound_channels, remove_channels
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import train
from worker.engine.training.quality import evaluate_module

torch.set_num_threads(1)


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_leaning_on_what_stays_never_raises_the_error(seed: int, channels: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, channels * size, generator=generator) @ torch.randn(
        channels * size, channels * size, generator=generator
    )
    weight = torch.randn(5, channels, size, generator=generator)
    stays = torch.rand(channels, generator=generator) > 0.4
    stays[0], stays[-1] = True, False

    leaning = lean_on(weight, rows.T @ rows, stays)

    assert not leaning[:, ~stays].any()
    wanted, plain = rows @ weight.flatten(1).T, rows @ (weight * stays[:, None]).flatten(1).T
    error = (rows @ leaning.flatten(1).T - wanted).square().sum()
    assert error <= (plain - wanted).square().sum() * (1 + 1e-4)


def test_a_channel_that_others_can_make_is_not_missed() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 3)
    rows = torch.cat([rows, rows @ torch.tensor([[1.0], [-2.0], [0.5]])], 1)
    weight = torch.randn(4, 4)

    leaning = lean_on(weight, rows.T @ rows, torch.tensor([True, True, True, False]))

    error = (rows @ leaning.T - rows @ weight.T).norm() / (rows @ weight.T).norm()
    assert error < 0.02


def test_channels_that_were_never_active_leave_the_weights_alone() -> None:
    weight = torch.randn(3, 4)
    leaning = lean_on(weight, torch.zeros(4, 4), torch.tensor([True, False, True, True]))
    assert torch.equal(leaning, weight * torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("name", ["cnn", "vit", "unet"])
def test_removing_what_nothing_needs_any_more_changes_nothing(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path)
    channels = find_sound_channels(program)
    channels.groups = [group for group in channels.groups if group.structure != "width"]
    chosen = {group.name: np.arange(group.num_units // 4 + 1) for group in channels.groups}
    batches = [program.example_inputs(8, seed=seed) for seed in range(2)]

    adjusted, num_layers = compensate(program, channels, chosen, batches)

    assert num_layers >= 2
    inputs = program.example_inputs(4, seed=9)
    small = remove_channels(adjusted, channels, chosen).program
    with torch.no_grad():
        outputs = [each.module.eval()(*inputs)[0] for each in (program, adjusted, small)]
    torch.testing.assert_close(outputs[1], outputs[2], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def error_of(program: Program, small: Program) -> float:
    inputs = program.example_inputs(32, seed=7)
    with torch.no_grad():
        one, other = (each.module.eval()(*inputs)[0] for each in (program, small))
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("structure", ["heads", "hidden_units"])
def test_transformers_lose_less(structure: str, tmp_path: Path) -> None:
    program = load("vit", tmp_path)
    examples = random_examples(program, tmp_path / "data", task="none")
    outcomes = [
        prune(program.copy(), examples, structures=[structure], compensate=each) for each in (False, True)
    ]  # fmt: skip
    assert [outcome.facts["layers_adjusted"] for outcome in outcomes] == [0, 2]
    plain, compensated = (error_of(program, pruned(outcome)) for outcome in outcomes)
    assert compensated < plain


def learned(tmp_path: Path) -> tuple[Program, BoundExamples]:
    program = make_cnn(8)
    examples = digit_examples(program, tmp_path / "data")
    train(program, examples, TrainingSettings(epochs=6, learning_rate=0.01), seed=0, report=lambda *_, **__: None)
    return program, examples


def test_a_pruned_network_knows_more_before_any_training(tmp_path: Path) -> None:
    program, examples = learned(tmp_path)
    outcomes = {each: prune(program.copy(), examples, ratio=0.5, compensate=each) for each in (False, True)}
    quality = {each: evaluate_module(pruned(outcome).module, examples, 64).value for each, outcome in outcomes.items()}
    assert quality[True] > quality[False] + 0.1
    assert outcomes[True].facts["parameters_after"] == outcomes[False].facts["parameters_after"]


def test_without_data_nothing_is_adjusted(tmp_path: Path) -> None:
    assert prune(load("cnn", tmp_path)).facts["layers_adjusted"] == 0


class Sums(nn.Module):
    """A residual block, a gate, an activation that adds a value to its own cube, and an added constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(a, b, 1) for a, b in ((3, 8), (8, 8), (8, 8)))
        self.left, self.right, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.inner(x)
        x = x + self.outer(y + 0.1 * y**3 + self.offset)
        logits: torch.Tensor = self.head(self.left(x) * self.right(x))
        return logits


def test_only_streams_that_layers_add_to_count_as_width(tmp_path: Path) -> None:
    program = load_module(Sums(), (torch.randn(2, 3, 4, 4),), tmp_path)
    structures = {group.name: group.structure for group in find_sound_channels(program).groups}
    assert structures == {"stem": "width", "inner": "channels", "left": "channels"}


def test_residual_streams_keep_their_width_unless_they_are_named(tmp_path: Path) -> None:
    program = load("resnet20", tmp_path)
    default = PruneStructured(kind="prune_structured").structures
    for structures, expected in ((default, (16, 8)), (("width",), (8, 16))):
        small = pruned(prune(program.copy(), structures=structures)).module
        assert (len(small.get_parameter("conv1.weight")), len(small.get_parameter("blocks.0.conv1.weight"))) == expected


def test_before_a_batch_norm_weights_stay_as_large_as_those_that_stay_were(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
            self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.second(self.first(x).relu())).relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    net.train()(torch.randn(64, 3, 8, 8))
    program = load_module(net.eval(), (torch.randn(2, 3, 8, 8),), tmp_path)
    channels = find_sound_channels(program)
    (group,) = [each for each in channels.groups if each.num_units == 16]
    chosen = {group.name: np.arange(8)}
    batches = [program.example_inputs(32, seed=seed) for seed in range(2)]

    adjusted, _ = compensate(program, channels, chosen, batches)

    before, after = (dict(each.module.named_modules())["second"].weight for each in (program, adjusted))
    assert after[:, :8].abs().max() == 0
    assert not torch.allclose(after[:, 8:], before[:, 8:], rtol=0.05)
    torch.testing.assert_close(after.norm(), before[:, 8:].norm())
    inputs = program.example_inputs(64, seed=9)
    plain = program.copy()
    with torch.no_grad():
        plain.module.get_parameter("second.weight")[:, :8] = 0
        wanted, made, without = (each.module.eval()(*inputs)[0] for each in (program, adjusted, plain))
    assert (made - wanted).norm() < 0.7 * (without - wanted).norm()
