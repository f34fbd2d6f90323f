"""8 bits are told apart layer by layer: which layer they hurt, and by how much."""

import pytest
import torch
from torch import nn

from tests.engine.techniques.opening import open_module
from worker.engine.programs.program import Program
from worker.engine.quantization.int8_effects import Activations, measure_int8_effects


class Tower(nn.Module):
    """An embedding, a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(32, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take (batch, 6) token ids."""
        x = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.last(self.first(x).relu()).mean(1)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Program:
    torch.manual_seed(0)
    return open_module(Tower(), (torch.randint(0, 32, (2, 6)),), tmp_path_factory.mktemp("tower"))


def measure(program: Program, activations: Activations, bits: int = 8, *, per_channel: bool = True) -> dict[str, float]:
    torch.manual_seed(1)
    effects = measure_int8_effects(
        program, {"table", "conv", "first", "last"}, (torch.randint(0, 32, (16, 6)),), bits=lambda _: bits,
        per_channel=per_channel, activations=lambda _: activations,
    )  # fmt: skip
    assert [each.layer for each in effects] == ["table", "conv", "first", "last"]
    assert [each.metric for each in effects] == ["weight_error", *["layer_output_error"] * 3]
    assert all(each.chosen and each.choice == "int8" for each in effects)
    assert effects[2].weight_bytes == 8 * 64 + 4 * (64 if per_channel else 1)
    return {each.layer: each.effect for each in effects}


def test_fewer_roundings_and_finer_grids_hurt_less(tower: Program) -> None:
    weights, rows, tensor = (measure(tower, each) for each in ("float", "per_row", "per_tensor"))
    coarse = measure(tower, "per_tensor", bits=7, per_channel=False)
    for name in ("conv", "first", "last"):
        assert 0 < weights[name] < tensor[name] < coarse[name] < 1e-2
    assert rows["last"] < tensor["last"]
    assert weights["table"] == tensor["table"] > 0


def test_the_layer_with_an_outlier_is_the_one_that_breaks(tower: Program) -> None:
    broken = tower.copy()
    with torch.no_grad():
        weight = broken.module.get_parameter("first.weight")
        weight[0, 0] = 20 * weight.abs().max()
    before, after = (measure(each, "float", per_channel=False) for each in (tower, broken))
    assert after["first"] > 20 * before["first"]
    assert after["first"] > 20 * max(after[name] for name in ("table", "conv", "last"))
    assert after["conv"] == before["conv"]


def test_weights_that_are_stored_otherwise_than_nearest_are_judged_as_stored(tower: Program) -> None:
    stored = tower.copy()
    with torch.no_grad():
        stored.module.get_parameter("last.weight").zero_()
    effects = measure_int8_effects(
        tower, {"last"}, (torch.randint(0, 32, (4, 6)),), bits=lambda _: 8, per_channel=True,
        activations=lambda _: "float", rounded=stored,
    )  # fmt: skip
    assert effects[0].effect == pytest.approx(1)
