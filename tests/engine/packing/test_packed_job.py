"""A whole job that makes a packed file: it is verified like the others, and both files are judged."""

from pathlib import Path

import pytest

from tests.engine.digits import Convolutions, Uploads, make_uploads
from tests.engine.process import Finished, plan_of, run

pytestmark = pytest.mark.timeout(300)
STEPS = [
    {"kind": "prune_magnitude", "sparsity": 0.7},
    {"kind": "share_weights", "bits": 4, "training": {"epochs": 1, "learning_rate": 0.003}},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Pruned and shared."""
    uploads: Uploads = make_uploads(Convolutions(), tmp_path_factory.mktemp("digits"))
    plan = plan_of("optimize", **uploads.fields(STEPS, target={"num_runs": 20}))
    return run(tmp_path_factory.mktemp("made") / "job", plan, uploads.files)


def test_the_packed_file_is_measured_and_judged_beside_the_other(made: Finished) -> None:
    metrics = made.good.metrics
    assert metrics is not None
    size = (made.directory / "out" / "artifacts" / "model.packed").stat().st_size
    assert metrics.result.packed_bytes == size
    assert metrics.baseline.packed_bytes is None
    assert metrics.comparison.packed_ratio == pytest.approx(size / metrics.baseline.file_bytes)
    assert metrics.result.packed_bytes < metrics.baseline.file_bytes / 10
    assert metrics.comparison.file_ratio == pytest.approx(1, abs=0.01)
    packed = [sentence for sentence in metrics.verdict.better if "packed" in sentence]
    assert len(packed) == 1
    assert "memory and speed are those of the dense model" in packed[0]
    assert any("The file is as large" in sentence for sentence in metrics.verdict.within_noise)
    pruned, shared = (step.packed_bytes for step in metrics.steps)
    assert pruned is not None
    assert shared is not None
    assert shared < pruned / 3
    assert shared < size < shared + 3000
    report = (made.directory / "out" / "artifacts" / "report.md").read_text()
    assert f"| packed file | - | {size:,} B |" in report


def test_it_reloads_in_a_fresh_process(made: Finished, tmp_path: Path) -> None:
    artifacts = made.directory / "out" / "artifacts"
    files = {path.name: path for path in artifacts.iterdir()}
    assert {"model.onnx", "model.packed"} <= set(files)
    assert run(tmp_path / "job", plan_of("verify", artifacts=sorted(files)), files).good.artifacts == ()
