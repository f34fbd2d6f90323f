"""The table of a job's numbers: which layers suffer most is shown where a step measured it."""

from pare.metrics import LayerEffect, Metrics
from pare.records import read
from pare.report import NUM_SENSITIVE, report, sensitivity_table, to_text
from tests.pare.conftest import make_metrics


def effects(num_layers: int) -> list[LayerEffect]:
    return [
        LayerEffect(0, f"layer{row}", choice, "output_error", row * effect, 10, choice == "int4")
        for row in range(num_layers)
        for choice, effect in (("int8", 0.001), ("int4", 0.1))
    ]


def test_the_worst_layers_come_first_with_a_star_on_the_choice() -> None:
    text = to_text(sensitivity_table(effects(12)))
    lines = [line for line in text.splitlines() if line.strip().startswith("layer") and "int8" not in line]
    assert len(lines) == NUM_SENSITIVE
    assert lines[0].split() == ["layer11", "0.011", "1.1*"]
    assert "8 worst of 12" in text


def test_choices_of_the_layers_own_stand_in_the_rows() -> None:
    own = [LayerEffect(0, f"layer{row}", f"rank {row}", "weight_error", row / 8, 10, True) for row in (1, 2, 3)]
    text = to_text(sensitivity_table(own))
    assert "weight_error of each layer" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("layer")] == [
        ["layer", "choice", "weight_error"],
        ["layer3", "rank", "3", "0.38*"],
        ["layer2", "rank", "2", "0.25*"],
        ["layer1", "rank", "1", "0.12*"],
    ]


def test_the_report_has_it_only_where_it_was_measured() -> None:
    plain = make_metrics().model_dump(mode="json")
    assert "each layer" not in to_text(report(read(Metrics, plain)))
    measured = plain | {"sensitivity": [each.__dict__ for each in effects(3)]}
    assert "output_error of the model by each layer alone" in to_text(report(read(Metrics, measured)))


def test_a_packed_file_has_a_row_where_there_is_one() -> None:
    plain = make_metrics().model_dump(mode="json")
    assert "packed file" not in to_text(report(read(Metrics, plain)))
    plain["result"]["packed_bytes"] = 51_200
    plain["comparison"]["packed_ratio"] = 0.0512
    (row,) = [line for line in to_text(report(read(Metrics, plain))).splitlines() if "packed file" in line]
    assert "50.0 KiB" in row
    assert "x0.051 of the file" in row
