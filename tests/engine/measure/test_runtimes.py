"""Model files in their runtimes, and the memory of a fresh process that runs them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from app.recipes.base import Runtime
from app.recipes.facts import TensorFacts
from app.recipes.recipe import Target
from tests.engine.tiny_model import SIGNATURE, TwoInputs, write_onnx, write_pt2
from worker.engine.errors import EngineFailure
from worker.engine.measure.inputs import choose_batch
from worker.engine.measure.memory import measure_peak_memory
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.program import Signature

WRITERS = {"onnxruntime": write_onnx, "torch": write_pt2}
RUNTIMES: list[Runtime] = ["onnxruntime", "torch"]


@pytest.fixture
def module() -> TwoInputs:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return TwoInputs().eval()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_go_in_and_outputs_come_out_in_the_order_of_the_signature(
    tmp_path: Path, module: TwoInputs, runtime: Runtime
) -> None:
    WRITERS[runtime](module, tmp_path / "model")
    inputs = (torch.randn(5, 3), torch.randn(5, 3))
    (outputs,) = open_model(tmp_path / "model", runtime, SIGNATURE, 1)(tuple(each.numpy() for each in inputs))
    np.testing.assert_allclose(outputs.astype(np.float64), module(*inputs).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_peak_memory_is_that_of_the_model_and_not_of_the_process_that_asks(
    tmp_path: Path, module: TwoInputs, runtime: Runtime
) -> None:
    ballast = np.ones(300 * 1024**2 // 8)  # resident here, and so in the inherited peak of a child
    WRITERS[runtime](module, tmp_path / "model")
    inputs = (np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32))
    peak = measure_peak_memory(tmp_path / "model", runtime, SIGNATURE, inputs, 1, tmp_path)
    assert 0 < peak.host_bytes < ballast.nbytes
    assert peak.device_bytes is None


def test_a_larger_model_needs_more_memory(tmp_path: Path, module: TwoInputs) -> None:
    write_onnx(module, tmp_path / "small")
    with torch.no_grad():
        module.layer = torch.nn.Linear(3, 4_000_000)
    write_onnx(module, tmp_path / "large")
    inputs = (np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32))
    small, large = (
        measure_peak_memory(tmp_path / name, "onnxruntime", SIGNATURE, inputs, 1, tmp_path).host_bytes
        for name in ("small", "large")
    )
    weights = 4_000_000 * 4 * 4
    assert small + weights < large < small + 6 * weights


def test_a_model_that_does_not_run_is_a_failure_of_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(EngineFailure, match=r"while running model\.onnx") as caught:
        measure_peak_memory(
            tmp_path / "model.onnx", "onnxruntime", SIGNATURE, (np.zeros((1, 3), np.float32),) * 2, 1, tmp_path
        )
    assert caught.value.code == "measurement_failed"


@pytest.mark.parametrize(
    ("fixed", "bounds", "wanted", "chosen", "said"),
    [
        (None, (1, None), 16, 16, ""),
        (8, (1, None), 1, 8, "Trained and measured at batch 8: the model was exported with a fixed batch"),
        (None, (1, 4), 16, 4, "Measured at batch 4 and not 16: the model was exported for batches of 1 to 4."),
        (None, (2, None), 1, 2, "Measured at batch 2 and not 1: the model was exported for batches of 2 to any."),
    ],
)
def test_the_batch_is_the_wanted_one_or_the_nearest_possible_and_it_is_said(
    fixed: int | None, bounds: tuple[int, int | None], wanted: int, chosen: int, said: str
) -> None:
    facts = TensorFacts(name="x", dtype="float32", shape=(fixed or "batch", 3))
    signature = Signature((facts,), (facts,), fixed, {} if fixed else {"batch": bounds})
    batch_size, notes = choose_batch(signature, Target(batch_size=wanted))
    assert batch_size == chosen
    assert "".join(notes).startswith(said)
    assert bool(notes) == bool(said)
