"""Every recipe of the GPU list, step by step, on a simulated device: nothing mixes devices, results are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.recipes.recipe import Recipe
from tests.engine.simulated_device import DEVICE, RemoteTensor, simulated_device
from tests.engine.techniques.digit_worlds import DATA, open_world
from tests.gpu.recipes import CASES, MODELS, NamedRecipe
from worker.engine.devices import CPU, device_of
from worker.engine.environment import make_repeatable
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context
from worker.engine.techniques.registry import TECHNIQUES

LEFT_OUT = {
    "finetune_bf16": "autocast knows no simulated device",
    "factorize_low_rank": "parameters that were counted with fake tensors cannot move to it",
    "quantize_int8_gptq": "exporting within a step takes minutes with every operator watched",
    "quantize_int8_static": "the same",
    "quantize_int8_torch": "it ends in a file, which test_quantize_int8_torch.py runs on the device",
    "quantize_int8_torch_weights": "the same",
    "quantize_aware_training": "the same",
}
LONG = ("quantize_int4_gptq-cnn", "quantize_int4_of_pruned-cnn", "quantize_mixed-cnn", "quantize_mixed-transformer")
CHOSEN = [
    pytest.param(model, recipe, id=name, marks=[pytest.mark.long] if name in LONG else [])
    for model, recipe in CASES
    if recipe.name not in LEFT_OUT and recipe.runtime == "torch"  # compiling leaves the program as it is
    for name in [f"{recipe.name}-{model}"]
]


def run(model: str, recipe: NamedRecipe, device: torch.device, directory: Path) -> tuple[Program, list[dict[str, Any]]]:
    program, examples = open_world(MODELS[model])
    original = program.copy()
    checked = Recipe.model_validate_json(json.dumps({"steps": recipe.steps, "data": DATA}))
    make_repeatable(1, checked.seed)
    directory.mkdir()
    facts = []
    for step in checked.steps:
        program.device = device
        context = Context(0, 1, directory, examples, lambda *_, **__: None, open_original=original.copy)
        # On the CPU torch would take a kernel for attention that rounds otherwise.
        with sdpa_kernel(SDPBackend.MATH):
            outcome = TECHNIQUES[step.kind].run(program, step, context)
        facts.append(outcome.facts)
        program = outcome.program if isinstance(outcome.program, Program) else program
    return program, facts


def tensors(program: Program) -> dict[str, Tensor]:
    encodings = {
        f"{name} {field}": value
        for name, encoding in program.encodings.items()
        for field, value in vars(encoding).items()
        if isinstance(value, Tensor)
    }
    masks = {f"{name} mask": mask for name, mask in program.masks.items()}
    return {**program.module.state_dict(), **masks, **encodings}


@pytest.mark.parametrize(("model", "recipe"), CHOSEN)
def test_a_recipe_on_a_device_leaves_what_it_leaves_on_the_cpu(model: str, recipe: NamedRecipe, tmp_path: Path) -> None:
    expected, facts = run(model, recipe, CPU, tmp_path / "cpu")
    with simulated_device() as simulated:
        made, facts_there = run(model, recipe, DEVICE, tmp_path / "device")
    assert simulated.num_operators > 0 or not recipe.computes
    assert device_of(made.module) == CPU
    found, wanted = tensors(made), tensors(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in found.items() if isinstance(tensor, RemoteTensor)]
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert facts_there == facts
