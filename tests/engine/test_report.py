"""report.md lists the layers that suffer most, in a form that can be read whatever the choices are."""

from app.recipes.metrics import LayerEffect
from tests.pare.conftest import make_metrics
from worker.engine.report import write_report


def write(*effects: LayerEffect) -> list[str]:
    lines = write_report(make_metrics().model_copy(update={"sensitivity": effects})).splitlines()
    return lines[lines.index("## Sensitivity") + 2 : lines.index("## Layers") - 1]


def effect(layer: str, choice: str, metric: str, value: float, *, chosen: bool = True) -> LayerEffect:
    return LayerEffect(step=0, layer=layer, choice=choice, metric=metric, effect=value, chosen=chosen)


def test_choices_that_all_layers_have_are_columns() -> None:
    lines = write(
        effect("a", "int8", "output_error", 0.25, chosen=False), effect("a", "int4", "output_error", 0.5),
        effect("b", "int8", "output_error", 0.125), effect("b", "int4", "output_error", 1.0, chosen=False),
    )  # fmt: skip
    assert "output error of the model when one layer alone is changed" in lines[0]
    assert lines[2:4] == ["| layer | int8 | int4 |", "|---|---:|---:|"]
    assert lines[4:] == ["| b | **0.125** | 1 |", "| a | 0.25 | **0.5** |"]


def test_choices_of_the_layers_own_are_rows() -> None:
    lines = write(effect("a", "rank 3", "weight_error", 0.25), effect("b", "rank 7x2", "weight_error", 0.5))
    assert "weight error of each layer, worst first" in lines[0]
    assert lines[2:4] == ["| layer | choice | weight error |", "|---|---|---:|"]
    assert lines[4:] == ["| b | rank 7x2 | **0.5** |", "| a | rank 3 | **0.25** |"]
