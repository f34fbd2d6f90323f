"""The whole engine on real models and data: what it measures, what it says, and what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch import nn

from app.recipes.metrics import Metrics
from app.recipes.recipe import KINDS
from tests.engine.digits import Convolutions, Rows, Uploads, make_uploads
from tests.engine.process import Finished, digest, plan_of, prepare, run
from worker.engine.arrays import read_npz, write_npz
from worker.engine.errors import VerificationFailed
from worker.engine.progress import Reporter
from worker.engine.verify import verify as verify_artifacts

pytestmark = pytest.mark.timeout(600)

FINETUNE: dict[str, Any] = {"kind": "finetune", "epochs": 2}
# Without keep_best, so that what training did is in the files and not the start it may fall back to.
TRAINED: dict[str, Any] = {**FINETUNE, "keep_best": False}
SMALLER: list[dict[str, Any]] = [
    {"kind": "prune_structured", "ratio": 0.5},
    FINETUNE,
    {"kind": "quantize_int8", "mode": "static"},
]
QUICK = {"num_runs": 30}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    """The CNN."""
    return make_uploads(Convolutions(), tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    """The transformer."""
    return make_uploads(Rows(), tmp_path_factory.mktemp("rows"))


def optimize(uploads: Uploads, directory: Path, steps: list[dict[str, Any]], **recipe: Any) -> Finished:
    fields = uploads.fields(steps, **{"target": QUICK, **recipe})
    return run(directory, plan_of("optimize", **fields), uploads.files)


def verify(made: Finished, directory: Path) -> Finished:
    return verify_all(made.directory / "out" / "artifacts", directory)


def verify_all(artifacts: Path, directory: Path) -> Finished:
    files = {path.name: path for path in artifacts.iterdir()}
    return run(directory, plan_of("verify", artifacts=sorted(files)), files)


def metrics_of(finished: Finished) -> Metrics:
    assert finished.good.metrics is not None
    return finished.good.metrics


@pytest.fixture(scope="module")
def smaller(digits: Uploads, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The whole chain: pruned, fine-tuned, integer."""
    return optimize(digits, tmp_path_factory.mktemp("smaller") / "job", SMALLER)


@pytest.fixture(scope="module")
def tuned(digits: Uploads, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Fine-tuned only; every format."""
    return optimize(digits, tmp_path_factory.mktemp("tuned") / "job", [TRAINED])


def test_a_good_model_is_described(tmp_path: Path, digits: Uploads) -> None:
    plan = plan_of("check_model", model=digits.fields([FINETUNE])["model"])
    facts = run(tmp_path / "job", plan, digits.files).good.model
    assert facts is not None
    assert [layer.name for layer in facts.layers if layer.type == "Conv2d"] == ["first.0", "second.0"]
    assert facts.dynamic_batch
    assert facts.parameters == sum(each.numel() for each in Convolutions().parameters())
    assert {each.kind: each.applicable for each in facts.capabilities} == dict.fromkeys(KINDS, True)


def test_what_is_no_model_is_rejected_with_a_reason(tmp_path: Path, digits: Uploads) -> None:
    plan = plan_of("check_model", model=digits.fields([FINETUNE])["model"])
    finished = run(tmp_path / "job", plan, {"model.pt2": digits.data})
    assert finished.status == 0
    assert finished.result is not None
    assert finished.result.error is not None
    assert finished.result.model is None
    assert finished.result.error.code not in ("engine_crash", "bad_plan")


def test_the_chain_makes_a_much_smaller_model_that_still_knows_its_digits(smaller: Finished) -> None:
    metrics = metrics_of(smaller)
    assert metrics.comparison.file_ratio < 0.5
    assert metrics.result.macs is not None
    assert metrics.baseline.macs is not None
    assert metrics.result.macs < 0.6 * metrics.baseline.macs
    assert metrics.baseline.quality is not None
    assert metrics.result.quality is not None
    assert metrics.baseline.quality.metric == "accuracy"
    assert metrics.baseline.quality.value > 0.9
    assert metrics.result.quality.value > 0.8
    assert metrics.verdict.outcome in ("better", "mixed")
    assert any("smaller" in sentence for sentence in metrics.verdict.better)


def test_every_step_and_layer_is_counted(smaller: Finished) -> None:
    metrics = metrics_of(smaller)
    assert [step.kind for step in metrics.steps] == ["prune_structured", "finetune", "quantize_int8"]
    layers = {layer.name: layer for layer in metrics.layers}
    second = layers["second.0"]
    assert second.shape_before == (64, 32, 3, 3)
    assert second.shape_after is not None
    assert second.shape_after[0] < 64
    assert second.shape_after[1] < 32
    assert second.parameters_after is not None
    assert second.parameters_after < second.parameters_before
    assert layers["classifier"].shape_after is not None
    assert layers["classifier"].shape_after[0] == 10


def test_progress_names_each_stage_once_and_never_falls(smaller: Finished) -> None:
    stages = list(dict.fromkeys(line.stage for line in smaller.lines))
    assert stages == [
        "ready", "started", "open_model", "baseline", "prune_structured", "finetune", "quantize_int8", "export",
        "measure", "artifacts", "finished",
    ]  # fmt: skip
    fractions = [line.fraction for line in smaller.lines]
    assert fractions == sorted(fractions)
    assert any("loss" in line.metrics for line in smaller.lines)
    assert {line.step for line in smaller.lines if line.stage == "finetune"} == {1}


def test_the_log_tells_the_stages_and_what_each_step_did(smaller: Finished) -> None:
    metrics = metrics_of(smaller)
    stages = ["open_model", "baseline", *(step["kind"] for step in SMALLER), "export", "measure", "artifacts"]
    lines = [line.partition(" s  ")[2] for line in smaller.log.splitlines()]
    assert [line for line in lines if line in stages] == stages
    assert f"  parameters_after = {metrics.steps[0].facts['parameters_after']}" in lines
    assert f"  {metrics.verdict.summary}" in lines


def test_an_integer_model_has_one_format_and_the_files_beside_it(smaller: Finished) -> None:
    names = {file.name for file in smaller.good.artifacts}
    assert names == {
        "model.onnx", "manifest.json", "load.py", "sample_input.npz", "sample_output.npz", "report.md"
    }  # fmt: skip
    assert {file.name: file.sha256 for file in smaller.good.artifacts} == smaller.artifacts


def test_a_trainable_result_has_every_format(tuned: Finished) -> None:
    assert {"model.onnx", "model.pt2", "model.safetensors"} <= set(tuned.artifacts)


def test_the_report_is_a_table_for_people(smaller: Finished) -> None:
    report = (smaller.directory / "out" / "artifacts" / "report.md").read_text()
    assert "| accuracy |" in report
    assert "| latency p50 |" in report
    assert metrics_of(smaller).verdict.summary in report


@pytest.mark.parametrize("made", ["smaller", "tuned"])
def test_artifacts_reload_in_a_fresh_process(request: pytest.FixtureRequest, tmp_path: Path, made: str) -> None:
    finished: Finished = request.getfixturevalue(made)
    result = verify(finished, tmp_path / "job").good
    assert result.metrics is None
    assert result.artifacts == ()


def test_artifacts_load_where_pare_is_not_installed(tuned: Finished, tmp_path: Path) -> None:
    artifacts = shutil.copytree(tuned.directory / "out" / "artifacts", tmp_path / "artifacts")
    done = subprocess.run(
        [sys.executable, "-I", str(artifacts / "load.py"), "--check"],
        cwd="/",
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference") == 2


def verify_here(artifacts: Path, directory: Path) -> None:
    """Run the same action in this process, for the many ways in which it fails."""
    files = {path.name: path for path in artifacts.iterdir()}
    plan = plan_of("verify", artifacts=sorted(files))
    verify_artifacts(plan, prepare(directory, plan, files), Reporter(lambda _: None))


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.safetensors", "load.py", "report.md"])
def test_a_changed_byte_in_an_artifact_fails_verification(tuned: Finished, tmp_path: Path, name: str) -> None:
    artifacts = shutil.copytree(tuned.directory / "out" / "artifacts", tmp_path / "artifacts")
    content = bytearray((artifacts / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifacts / name).write_bytes(content)
    with pytest.raises(VerificationFailed, match=name):
        verify_here(artifacts, tmp_path / "job")


@pytest.mark.parametrize("name", ["model.onnx", "sample_output.npz", "manifest.json"])
def test_a_missing_artifact_fails_verification(tuned: Finished, tmp_path: Path, name: str) -> None:
    artifacts = shutil.copytree(tuned.directory / "out" / "artifacts", tmp_path / "artifacts")
    (artifacts / name).unlink()
    with pytest.raises(VerificationFailed, match=name):
        verify_here(artifacts, tmp_path / "job")


def change_file(artifacts: Path, name: str, arrays: dict[str, Any]) -> None:
    """Replace a file of arrays and its digest in the manifest, as somebody who knows both would."""
    (save_file if name.endswith(".safetensors") else write)(arrays, artifacts / name)
    manifest = json.loads((artifacts / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = digest(artifacts / name)
    (artifacts / "manifest.json").write_text(json.dumps(manifest))


def write(arrays: dict[str, Any], path: Path) -> None:
    write_npz(path, arrays)


def test_outputs_that_differ_fail_verification_with_the_difference(tuned: Finished, tmp_path: Path) -> None:
    artifacts = shutil.copytree(tuned.directory / "out" / "artifacts", tmp_path / "artifacts")
    outputs = read_npz(artifacts / "sample_output.npz")
    change_file(artifacts, "sample_output.npz", {name: np.add(array, np.float32(1)) for name, array in outputs.items()})
    finished = verify_all(artifacts, tmp_path / "job")
    assert finished.result is not None
    assert finished.result.error is not None
    assert finished.result.error.code == "verification_failed"
    assert "model.onnx: output" in finished.result.error.detail
    assert "differs from the sample output by 1" in finished.result.error.detail


def test_weights_that_are_not_the_models_fail_verification(tuned: Finished, tmp_path: Path) -> None:
    artifacts = shutil.copytree(tuned.directory / "out" / "artifacts", tmp_path / "artifacts")
    weights = load_file(artifacts / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    change_file(artifacts, "model.safetensors", weights)
    with pytest.raises(VerificationFailed, match=r"'classifier\.bias' in model\.safetensors is not equal"):
        verify_here(artifacts, tmp_path / "job")


def test_zeros_are_reported_as_zeros_and_never_as_a_smaller_file(tmp_path: Path, digits: Uploads) -> None:
    metrics = metrics_of(
        optimize(
            digits, tmp_path / "job", [{"kind": "prune_magnitude", "sparsity": 0.6}], outputs={"formats": ["onnx"]}
        )
    )
    assert metrics.result.parameters == metrics.baseline.parameters
    assert metrics.result.nonzero_parameters < 0.5 * metrics.result.parameters
    assert metrics.comparison.file_ratio == pytest.approx(1, abs=0.01)
    assert not any("smaller" in sentence for sentence in metrics.verdict.better)
    assert any("zero" in warning for warning in metrics.verdict.warnings)


def test_the_same_job_gives_the_same_model_files(tmp_path: Path, digits: Uploads, smaller: Finished) -> None:
    again = optimize(digits, tmp_path / "job", SMALLER)
    for name in ("model.onnx", "sample_input.npz", "sample_output.npz", "load.py"):
        assert again.artifacts[name] == smaller.artifacts[name], name


def test_the_same_training_gives_the_same_files_in_every_format(
    tmp_path: Path, digits: Uploads, tuned: Finished
) -> None:
    again = optimize(digits, tmp_path / "job", [TRAINED])
    assert metrics_of(again).steps[0].facts["steps_run"] > 0  # type: ignore[operator]
    for name in ("model.onnx", "model.pt2", "model.safetensors"):
        assert again.artifacts[name] == tuned.artifacts[name], name


def test_a_transformer_is_quantized_without_data_and_the_report_says_what_was_not_measured(
    tmp_path: Path, rows: Uploads
) -> None:
    made = optimize(rows, tmp_path / "job", [{"kind": "quantize_int8", "mode": "dynamic"}], with_data=False)
    metrics = metrics_of(made)
    assert metrics.result.quality is None
    assert metrics.comparison.equivalence[0].cosine > 0.98
    assert any("no data" in warning for warning in metrics.verdict.warnings)


def test_torch_can_be_the_runtime(tmp_path: Path, rows: Uploads) -> None:
    target = {"runtime": "torch", "num_runs": 10}
    step = {"kind": "finetune", "max_steps": 20}
    made = optimize(rows, tmp_path / "job", [step], target=target, outputs={"formats": ["pt2"]})
    metrics = metrics_of(made)
    assert metrics.environment.runtime == "torch"
    assert "model.onnx" not in made.artifacts
    assert metrics.result.file_bytes == (made.directory / "out" / "artifacts" / "model.pt2").stat().st_size


def test_a_fixed_batch_is_measured_at_that_batch_and_it_is_said(tmp_path: Path) -> None:
    module: nn.Module = Convolutions()
    uploads = make_uploads(module, tmp_path, epochs=1, fixed_batch=8)
    made = optimize(uploads, tmp_path / "job", [{"kind": "finetune", "max_steps": 20}], outputs={"formats": ["onnx"]})
    metrics = metrics_of(made)
    assert metrics.result.latency.batch_size == 8
    assert any("fixed batch of 8" in warning for warning in metrics.verdict.warnings)
    verify(made, tmp_path / "verify").good  # noqa: B018  # raises when it is not
