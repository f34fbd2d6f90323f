"""A valid archive, from which the hostile ones are made."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.engine.programs.hostile import (
    Members,
    read_members,
)


class Small(nn.Module):
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.norm(self.conv(x))).mean([2, 3]) + self.table
        return {"logits": self.fc(y.reshape(y.shape[0], 4)), "y": torch.div(y, 2.0, rounding_mode="floor")}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("valid") / "model.pt2"
    shapes = ({0: Dim("n"), 2: Dim("h", min=5, max=64)},)
    torch.export.save(torch.export.export(Small().eval(), (torch.randn(3, 1, 9, 9),), dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def members(valid: Path) -> Members:
    return read_members(valid)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"
