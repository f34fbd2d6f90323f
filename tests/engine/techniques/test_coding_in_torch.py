"""Coding steps whose result torch runs: they say what is true of that file, and a whole job proves it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.recipes.base import Runtime
from app.recipes.recipe import KINDS, Target
from tests.engine.digits import make_uploads
from tests.engine.process import plan_of, run
from tests.engine.techniques.learning import context, make_zoo, random_examples
from worker.engine.techniques.base import Outcome
from worker.engine.techniques.registry import TECHNIQUES

STEPS: tuple[dict[str, Any], ...] = (
    {"kind": "quantize_int4", "bits": 3},
    {"kind": "quantize_float", "format": "fp8_e4m3"},
    {"kind": "quantize_fixed", "bits": 11},
    {"kind": "quantize_mixed", "num_calibration_examples": 8, "method": "rtn"},
    {"kind": "share_weights"},
)


def code(step: dict[str, Any], runtime: Runtime, directory: Path) -> Outcome:
    torch.set_num_threads(1)
    program = make_zoo("mlp")
    examples = random_examples(program, directory, 48, task="none")
    given = replace(context(examples), target=Target(runtime=runtime))
    return TECHNIQUES[step["kind"]].run(program, KINDS[step["kind"]].model_validate(step), given)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["kind"])
def test_each_step_says_what_is_true_of_the_file_that_is_run(step: dict[str, Any], tmp_path: Path) -> None:
    in_torch, in_onnx = (code(step, runtime, tmp_path) for runtime in ("torch", "onnxruntime"))
    assert any("decoded at every call" in each for each in in_torch.warnings)
    assert not any("decoded at every call" in each for each in in_onnx.warnings)
    # Of other files nothing is said: neither what they are stored in, nor that this is no more than storage.
    wrong = ("model.onnx", "model.packed only", "storage gain", "only take fewer bytes")
    assert not [each for each in in_torch.warnings if any(words in each for words in wrong)]
    if step["kind"] == "quantize_int4":
        counted = [in_torch.facts[f"layers_{word}"] for word in ("coded", "in_integers", "storage_only")]
        assert counted == [3, 0, 0]
        assert in_torch.facts["layers_decoded_at_every_call"] == 3


class Wide(nn.Module):
    """Enough weights to be seen beside the graph and the runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU())
        self.head = nn.Linear(2048, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(image))
        return logits


@pytest.mark.long
@pytest.mark.parametrize("step", [STEPS[0], {"kind": "quantize_float", "format": "bf16"}], ids=str)
def test_a_whole_job_measures_the_codes_and_verifies_every_file(step: dict[str, Any], tmp_path: Path) -> None:
    uploads = make_uploads(Wide(), tmp_path, epochs=1)
    target, outputs = {"runtime": "torch", "num_runs": 10}, {"formats": ["pt2", "safetensors", "packed", "onnx"]}
    finished = run(
        tmp_path / "job", plan_of("optimize", **uploads.fields([step], target=target, outputs=outputs)), uploads.files
    )
    metrics = finished.good.metrics
    assert metrics is not None
    files = {path.name: path for path in (finished.directory / "out" / "artifacts").iterdir()}
    assert metrics.result.file_bytes == files["model.pt2"].stat().st_size
    assert metrics.comparison.file_ratio < 0.52
    assert metrics.comparison.equivalence[0].cosine > 0.99
    again = run(tmp_path / "verify", plan_of("verify", artifacts=sorted(files)), files)
    assert again.good.artifacts == ()
