"""MACs against hand counts and torch's own counter; the facts that intake reports."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.zoo import ZOO, export_model
from worker.engine.measure.macs import count_macs
from worker.engine.programs.describe import describe
from worker.engine.programs.intake import open_program


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "mobilenet", "unet", "two_tower", "gru_deep"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_agrees_with_torch(name: str, dynamic: bool, tmp_path: Path) -> None:
    model = export_model(name, tmp_path / "model.pt2", dynamic=dynamic)
    count = count_macs(open_program(tmp_path / "model.pt2", tmp_path))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*ZOO[name].inputs(1), **ZOO[name].keywords(1))
    assert count.total == counter.get_total_flops() // 2
    assert sum(count.by_layer.values()) == count.total
    assert count.uncounted == ()


def test_recurrent_layers_and_attention_by_hand(tmp_path: Path) -> None:
    export_model("lstm_deep", tmp_path / "model.pt2")
    count = count_macs(open_program(tmp_path / "model.pt2", tmp_path))
    # 7 steps, 2 directions, 4 gates of 16, from 12 and 16, then from 32 and 16.
    assert count.by_layer["rnn"] == 7 * 2 * 4 * 16 * ((12 + 16) + (32 + 16))
    export_model("gpt", tmp_path / "gpt.pt2")
    gpt = count_macs(open_program(tmp_path / "gpt.pt2", tmp_path))
    # Two blocks of 4 heads of width 8 over 9 tokens: queries by keys, then weights by values.
    assert gpt.total - sum(gpt.by_layer.values()) == 2 * 4 * 9 * 9 * (8 + 8)


def test_counting_changes_nothing(tmp_path: Path) -> None:
    export_model("cnn", tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    program.module.train()
    before = {name: value.clone() for name, value in program.module.state_dict().items()}
    count_macs(program)
    assert all(torch.equal(value, before[name]) for name, value in program.module.state_dict().items())
    assert program.module.training


class Distance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centers) + torch.einsum("bi,ji->bj", x, self.centers)


def test_what_is_not_counted_is_named(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Distance(), (torch.randn(2, 4),)), tmp_path / "model.pt2")
    count = count_macs(open_program(tmp_path / "model.pt2", tmp_path))
    assert count.total == 4 * 3
    assert count.uncounted == ("aten.cdist.default",)


def test_described_facts(tmp_path: Path) -> None:
    model = export_model("cnn", tmp_path / "model.pt2", dynamic=False)
    facts = describe(open_program(tmp_path / "model.pt2", tmp_path))
    assert facts.parameters == sum(value.numel() for value in model.parameters())
    assert facts.buffers == sum(value.numel() for value in model.buffers())
    assert facts.parameter_bytes == 4 * facts.parameters
    assert (facts.dynamic_batch, facts.batch_size, facts.exported_in) == (False, 4, "eval")
    layers = {layer.name: layer for layer in facts.layers}
    assert list(layers) == ["features.0", "features.1", "features.4", "features.5", "fc1", "fc2"]
    assert (layers["features.0"].type, layers["features.0"].shape, layers["features.0"].macs) == (
        "Conv2d",
        (16, 1, 3, 3),
        9216,
    )
    assert any("fixed at 4" in warning for warning in facts.warnings)
