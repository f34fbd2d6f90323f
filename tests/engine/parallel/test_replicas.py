"""Data parallel with what a step may bring along: a loss of its own, simulated rounding, ignored labels."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.parallel.runs import difference, run
from tests.engine.techniques.learning import digit_examples, make_cnn
from worker.engine.programs.program import FileProgram, Program
from worker.engine.training.parts import split_batch

SHORT: dict[str, Any] = {
    "max_steps": 4,
    "learning_rate": 0.02,
    "optimizer": "sgd",
    "warmup_fraction": 0.0,
    "keep_best": False,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_distillation_with_a_projection(tmp_path: Path) -> None:
    start, teacher = make_cnn(4), make_cnn(8)
    alone = start.copy()
    examples = digit_examples(start, tmp_path)
    spec: dict[str, Any] = {**SHORT, "batch_size": 32, "hidden_weight": 0.5, "kind": "distill", "teacher": teacher}

    run(alone, examples, tmp_path / "alone", **spec)
    outcome = run(start.copy(), examples, tmp_path / "together", **spec, parallel={"data": 2})

    together = outcome.program
    assert isinstance(together, Program)
    assert outcome.facts["projections"]
    # The feature loss divides by the teacher's mean square, of a share here: as with accumulate, almost the same.
    assert difference(alone, together) < 0.02 < difference(alone, start)


def test_quantization_aware_training_sees_the_ranges_of_the_whole_batch(tmp_path: Path) -> None:
    start = make_cnn(4)
    examples = digit_examples(start, tmp_path)
    spec: dict[str, Any] = {**SHORT, "batch_size": 32, "kind": "quantize_aware_training"}

    one = run(start.copy(), examples, tmp_path / "alone", **spec)
    two = run(start.copy(), examples, tmp_path / "together", **spec, parallel={"data": 2})

    # A rounding error in the sums may move a weight across the border between two integers: not many.
    assert _share_of_equal_bytes(one.program, two.program) > 0.95


def _share_of_equal_bytes(one: object, other: object) -> float:
    assert isinstance(one, FileProgram)
    assert isinstance(other, FileProgram)
    first, second = one.path.read_bytes(), other.path.read_bytes()
    assert len(first) == len(second)
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_the_shares_of_all_parts_are_the_batch(num_shares: int) -> None:
    inputs, labels = (torch.arange(11),), torch.arange(11).remainder(4)
    labels[3:6] = -100
    shares = [split_batch((inputs, labels), "classification", 2, num_shares, share) for share in range(num_shares)]
    rows = torch.cat([part[0][0] for parts in zip(*shares, strict=True) for part, _ in parts])
    weights = sum(weight for parts in shares for _, weight in parts)
    assert rows.tolist() == list(range(11))
    assert weights == pytest.approx(1.0)
