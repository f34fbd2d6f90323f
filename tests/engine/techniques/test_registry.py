"""The list of techniques: complete, in order, and honest about a model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.recipes.recipe import KINDS
from tests.engine.techniques.opening import open_module
from tests.engine.zoo import export_model
from worker.engine.programs.intake import open_program
from worker.engine.techniques.registry import TECHNIQUES, inspect_all


def test_every_kind_of_the_request_language_has_its_technique() -> None:
    assert list(TECHNIQUES) == list(KINDS)
    for kind, technique in TECHNIQUES.items():
        assert technique.__name__.rpartition(".")[2] == kind
        assert callable(technique.inspect)
        assert callable(technique.run)


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_capabilities_of_a_model_name_its_own_layers(name: str, tmp_path: Path) -> None:
    export_model(name, tmp_path / "model.pt2", dynamic=False)
    (tmp_path / "work").mkdir()
    program = open_program(tmp_path / "model.pt2", tmp_path / "work")
    layers = {layer for layer, _ in program.module.named_modules()}
    capabilities = inspect_all(program)
    assert [capability.kind for capability in capabilities] == list(KINDS)
    for capability in capabilities:
        assert capability.applicable == bool(capability.layers)
        assert set(capability.layers) <= layers
    fixed = capabilities[list(KINDS).index("finetune")].missing
    assert fixed is not None
    assert "exactly 4 examples" in fixed


class Weightless(nn.Module):
    """Nothing to optimize."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Table(nn.Module):
    """An embedding and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x)
        return found


@pytest.mark.parametrize(
    ("module", "inputs"), [(Weightless(), torch.rand(2, 3)), (Table(), torch.randint(0, 9, (2, 3)))]
)
def test_what_does_not_apply_says_why(module: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    refused = [each for each in inspect_all(open_module(module, (inputs,), tmp_path)) if not each.applicable]
    assert {"prune_structured", "factorize_low_rank", "prune_magnitude", "quantize_int8"} <= {e.kind for e in refused}
    assert [each.kind for each in refused if not each.missing] == []
    # The reason comes first, not what the technique would do elsewhere.
    (int8,) = [each for each in refused if each.kind == "quantize_int8"]
    assert int8.missing is not None
    assert int8.missing.startswith("there are no")
