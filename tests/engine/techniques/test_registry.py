"""The list of techniques: complete, in order, and honest about a model."""

from pathlib import Path

import pytest

from app.recipes.recipe import KINDS
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
