"""The list of recipes through the whole engine: a few of them on the CPU, all of them where there is a GPU."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes.recipe import KINDS
from tests.engine.digits import Uploads, make_uploads
from tests.engine.process import plan_of, run
from tests.gpu.recipes import CASES, MODELS, NamedRecipe

pytestmark = pytest.mark.timeout(600)

ON_CPU = ("quantize_int8_torch-transformer", "finetune_compiled-cnn")
"""One of each runtime is enough to hold the way of a recipe through here; a simulated device runs nearly all."""
INTEGER = ("quantize_int8", "quantize_aware_training")
NAMES = {f"{recipe.name}-{model}": (model, recipe) for model, recipe in CASES}


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Uploads]:
    return {name: make_uploads(make(), tmp_path_factory.mktemp(name), epochs=1) for name, make in MODELS.items()}


def optimize(uploads: Uploads, recipe: NamedRecipe, device: str, directory: Path) -> None:
    target: dict[str, Any] = {"num_runs": 10}
    if recipe.in_torch or recipe.steps[-1]["kind"] not in INTEGER:
        target |= {"device": device, "runtime": recipe.runtime}
    plan = plan_of("optimize", **uploads.fields(recipe.steps, target=target))
    made = run(directory, plan, uploads.files)
    metrics = made.good.metrics
    assert metrics is not None
    assert metrics.environment.target_device == target.get("device", "cpu")
    on_gpu = target.get("device") == "cuda"
    assert (metrics.result.peak_device_memory_bytes is not None) == on_gpu
    assert (metrics.environment.device is not None) == torch.cuda.is_available()
    assert metrics.result.latency.p50_ms > 0
    artifacts = {path.name: path for path in (directory / "out" / "artifacts").iterdir()}
    checked = run(directory / "verify", plan_of("verify", artifacts=sorted(artifacts)), artifacts)
    assert checked.good.error is None


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("name", ON_CPU)
def test_a_recipe_runs_on_the_cpu(name: str, uploads: dict[str, Uploads], tmp_path: Path) -> None:
    model, recipe = NAMES[name]
    optimize(uploads[model], recipe, "cpu", tmp_path / "job")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_a_gpu(name: str, uploads: dict[str, Uploads], tmp_path: Path) -> None:
    model, recipe = NAMES[name]
    optimize(uploads[model], recipe, "cuda", tmp_path / "job")


def test_every_kind_is_in_the_list() -> None:
    # These two put another model in the place of this one, on the CPU.
    students = {"derive_student", "take_student"}
    assert {step["kind"] for _, recipe in CASES for step in recipe.steps} == set(KINDS) - students
