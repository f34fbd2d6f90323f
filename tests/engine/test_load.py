"""load.py: a single file that loads, verifies and checks artifacts where Pare is not installed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

from app.recipes.metrics import Environment, Equivalence, Latency, Measurement, Metrics, Ratio
from app.recipes.plan import ArtifactFile, ModelFile, Plan
from app.recipes.recipe import Recipe
from tests.engine.tiny_model import SIGNATURE, TwoInputs, write_onnx, write_pt2
from worker.engine import load
from worker.engine.artifacts import choose_tolerance, write_artifacts
from worker.engine.measure.compare import compare
from worker.engine.measure.verdict import judge
from worker.engine.programs.export_packed import export_packed
from worker.engine.programs.intake import open_program

LATENCY = Latency(batch_size=1, num_threads=1, num_runs=10, p50_ms=1.0, p90_ms=1.0, p99_ms=1.0, mean_ms=1.0)
MEASURED = Measurement(
    quality=None,
    latency=LATENCY,
    throughput_per_second=1000.0,
    peak_memory_bytes=1_000_000,
    file_bytes=1000,
    parameters=8,
    nonzero_parameters=8,
    macs=6,
)


def metrics() -> Metrics:
    equal = Equivalence(output="sum", cosine=1.0, snr_db=None, max_abs_error=0.0, num_examples=4)
    comparison = compare(MEASURED, MEASURED, Ratio(value=1.0, low=0.99, high=1.01), [equal])
    return Metrics(
        baseline=MEASURED,
        result=MEASURED,
        comparison=comparison,
        steps=(),
        layers=(),
        verdict=judge(MEASURED, MEASURED, comparison),
        environment=Environment(processor="p", num_cores=1, runtime="torch", num_threads=1, versions={}),
    )


def plan() -> Plan:
    recipe = Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}]})
    return Plan(action="optimize", model=ModelFile(file="model.pt2", format="pt2", sha256="0" * 64), recipe=recipe)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[ArtifactFile, ...]]:
    """Artifacts of a tiny model with two inputs."""
    directory = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = TwoInputs().eval()
    inputs = (torch.randn(4, 3), torch.randn(4, 3))
    write_pt2(module, directory / "model.pt2")
    save_file({name: tensor.numpy() for name, tensor in module.state_dict().items()}, directory / "model.safetensors")
    write_onnx(module, directory / "model.onnx")
    (directory / "scratch").mkdir()
    program = open_program(directory / "model.pt2", directory / "scratch")
    named = replace(program.signature, outputs=SIGNATURE.outputs)
    export_packed(replace(program, signature=named), directory / "model.packed")
    shutil.rmtree(directory / "scratch")
    samples = (
        {"x": inputs[0].numpy(), "file": inputs[1].numpy()},
        {"sum": module(*inputs).detach().numpy()},
    )
    files = write_artifacts(plan(), metrics(), SIGNATURE, samples, directory, integer=False)
    return directory, files


def copy(made: tuple[Path, tuple[ArtifactFile, ...]], to: Path) -> Path:
    for file in made[1]:
        (to / file.name).write_bytes((made[0] / file.name).read_bytes())
    return to


def run_alone(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run load.py isolated, elsewhere, and in an interpreter that does not see the project."""
    blocker = (
        "import runpy, sys\n"
        f"sys.path = [each for each in sys.path if each != {str(Path.cwd())!r}]\n"
        "sys.argv = sys.argv[1:]\n"
        "for name in ('app', 'worker', 'pare'): sys.modules[name] = None\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", blocker, str(directory / "load.py"), *arguments],
        cwd="/",
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_it_runs_every_model_where_pare_is_not_importable(made: tuple[Path, Any]) -> None:
    done = run_alone(made[0], "--check")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["model.onnx", "model.packed", "model.pt2"]
    assert "largest difference" in done.stdout


def test_no_library_reports_to_its_maker(made: tuple[Path, Any], tmp_path: Path) -> None:
    """ONNX Runtime 1.32 leaves the session that it reports in a file of the temporary directory."""
    done = run_alone(made[0], "--file", "model.onnx", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [sys.executable, "-c", "import worker.engine, onnxruntime"],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
        check=True,
        timeout=120,
    )
    assert list(tmp_path.iterdir()) == []


def test_it_needs_only_the_one_model_file_it_is_asked_for(made: tuple[Path, Any], tmp_path: Path) -> None:
    directory = copy(made, tmp_path)
    for name in ("model.packed", "model.pt2", "model.safetensors"):
        (directory / name).unlink()
    done = run_alone(directory, "--file", "model.onnx", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "model.packed", "model.pt2", "model.safetensors", "sample_input.npz"])
def test_a_changed_byte_is_noticed_before_anything_is_loaded(made: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    path = copy(made, tmp_path) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    opens: dict[str, Callable[[], object]] = {
        "sample_input.npz": lambda: load.load_samples(tmp_path),
        "model.safetensors": lambda: load.load_weights(path),
    }
    with pytest.raises(ValueError, match=f"{name} has sha256"):
        opens.get(name, lambda: load.load(path))()


def test_packed_weights_load_and_become_an_ordinary_onnx_file(made: tuple[Path, Any], tmp_path: Path) -> None:
    weights = load.load_weights(made[0] / "model.packed")
    assert {name: array.shape for name, array in weights.items()} == {"layer.weight": (2, 3), "layer.bias": (2,)}
    done = run_alone(made[0], "--unpack", str(tmp_path / "unpacked.onnx"))
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(onnx.load(tmp_path / "unpacked.onnx"), full_check=True)


def test_weights_without_a_model_file_are_checked_too(made: tuple[Path, Any], tmp_path: Path) -> None:
    copy(made, tmp_path)
    for name in ("model.onnx", "model.packed", "model.pt2"):
        (tmp_path / name).unlink()
    for right in (True, False):
        if not right:
            with (tmp_path / "model.safetensors").open("ab") as file:
                file.write(b"x")
        ran = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "load.py"), "--check"], capture_output=True, text=True, check=False
        )
        assert (ran.returncode == 0) is right, ran.stderr
        assert ("arrays, digest as in the manifest" in ran.stdout) is right


def test_check_fails_on_a_difference_above_the_tolerance(made: tuple[Path, Any], tmp_path: Path) -> None:
    directory = copy(made, tmp_path)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["tolerances"]["sum"] = -1.0
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert run_alone(directory, "--check", "--file", "model.onnx").returncode == 1
    assert run_alone(directory, "--file", "model.onnx").returncode == 0


def test_models_take_and_give_arrays_by_name(made: tuple[Path, Any]) -> None:
    inputs, expected = load.load_samples(made[0])
    weights = load.load_weights(made[0] / "model.safetensors")
    by_hand = (inputs["x"] + inputs["file"]) @ weights["layer.weight"].T + weights["layer.bias"]
    for name in ("model.onnx", "model.pt2"):
        outputs = load.load(made[0] / name)(dict(reversed(inputs.items())))
        np.testing.assert_allclose(outputs["sum"], by_hand, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs["sum"], expected["sum"], rtol=1e-5, atol=1e-6)


def test_wrong_input_names_are_told(made: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match=r"takes the inputs \['x', 'file'\], not \['y'\]"):
        load.load(made[0] / "model.onnx")({"y": np.zeros((1, 3), np.float32)})


def test_the_manifest_says_where_everything_comes_from(made: tuple[Path, tuple[ArtifactFile, ...]]) -> None:
    directory, files = made
    manifest = json.loads((directory / "manifest.json").read_text())
    assert set(manifest) == {
        "files", "signature", "tolerances", "made_from", "recipe", "seed", "versions", "metrics"
    }  # fmt: skip
    assert {file.name for file in files} == {*manifest["files"], "manifest.json"}
    assert {file.name: file.sha256 for file in files if file.name != "manifest.json"} == {
        name: entry["sha256"] for name, entry in manifest["files"].items()
    }
    assert manifest["made_from"]["model"]["sha256"] == "0" * 64
    assert Recipe.model_validate_json(json.dumps(manifest["recipe"])) == plan().recipe
    assert manifest["versions"]["torch"] == str(torch.__version__)


def test_the_same_samples_give_the_same_bytes(made: tuple[Path, Any], tmp_path: Path) -> None:
    copy(made, tmp_path)
    inputs, outputs = load.load_samples(tmp_path)
    write_artifacts(plan(), metrics(), SIGNATURE, (inputs, outputs), tmp_path, integer=False)
    for name in ("sample_input.npz", "sample_output.npz", "load.py", "report.md"):
        assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("output", "integer", "expected"),
    [
        (np.array([2.0, -4.0], np.float32), False, 4e-3),
        (np.array([2.0, -4.0], np.float32), True, 0.2),
        (np.array([2.0, np.inf], np.float16), False, 0.04),
        (np.array([7], np.int64), True, 0.0),  # a chosen class is either the same or it is not
        (np.zeros(3, np.float32), False, 1e-6),
    ],
)
def test_tolerance_follows_the_size_of_the_outputs(output: Any, integer: bool, expected: float) -> None:
    assert choose_tolerance(output, integer=integer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([1.0, 2.0], [1.5, 2.0], 0.5),
        ([np.inf, np.nan], [np.inf, np.nan], 0.0),
        ([1.0], [np.nan], np.inf),
        ([np.inf], [-np.inf], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_largest_difference(expected: list[float], actual: list[float], difference: float) -> None:
    assert load.largest_difference(np.array(expected), np.array(actual)) == difference
