"""Every recipe of the GPU list, step by step, on a simulated device: nothing mixes devices, results are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.recipes.recipe import Recipe, Target
from tests.engine.simulated_autocast import autocast_as_on_cuda
from tests.engine.simulated_device import DEVICE, RemoteTensor, simulated_device
from tests.engine.techniques.digit_worlds import DATA, open_world
from tests.gpu.recipes import CALIBRATION, CASES, MODELS, TRAINING, NamedRecipe
from worker.engine.devices import CPU, device_of
from worker.engine.environment import make_repeatable
from worker.engine.programs.program import FileProgram, Program
from worker.engine.techniques.base import Context
from worker.engine.techniques.registry import TECHNIQUES

LONG = (
    "quantize_int4_gptq-cnn", "quantize_int4_of_pruned-cnn", "quantize_mixed-cnn", "quantize_mixed-transformer",
    "quantize_int8_gptq-cnn", "quantize_int8_gptq-transformer", "quantize_int8_static-cnn", "quantize_int8_torch-cnn",
    "quantize_int8_torch-transformer", "quantize_int8_torch_weights-cnn", "quantize_int8_torch_weights-transformer",
    "quantize_aware_training-cnn", "quantize_aware_training-transformer",
)  # fmt: skip
QUICK = ("student", "symmetric_int4")
CHOSEN = [
    pytest.param(model, recipe, id=name, marks=[pytest.mark.long] if name in LONG else [])
    for model, recipe in CASES
    if recipe.runtime == "torch"  # compiling leaves the program as it is
    for name in [f"{recipe.name}-{model}"]
]
OTHER_OPTIONS = (
    NamedRecipe("student", [{"kind": "derive_student", "width": 0.5}, {"kind": "distill", **TRAINING, "epochs": 2}],
                only="cnn"),
    NamedRecipe("student_by_magnitude", [{"kind": "derive_student", "width": 0.5, "criterion": "magnitude"},
                                            {"kind": "distill", **TRAINING, "hidden_weight": 1.0}], only="transformer"),
    NamedRecipe("optimizers", [{"kind": "train", **TRAINING, "optimizer": "sgd", "augmentations": ["flip", "crop"],
                                "label_smoothing": 0.1, "schedule": "step"},
                               {"kind": "finetune", **TRAINING, "optimizer": "rmsprop", "epochs": 2, "patience": 1}],
                only="cnn"),
    NamedRecipe("rounds", [{"kind": "prune_structured", "of": "macs", "criterion": "taylor", "scope": "global",
                            "round_to": 4, "num_iterations": 2, "training": TRAINING, **CALIBRATION}], only="cnn"),
    NamedRecipe("gradual_zeros", [{"kind": "prune_magnitude", "scope": "local", "schedule": "cubic",
                                   "num_iterations": 2, "training": {**TRAINING, "precision": "bf16"}},
                                  {"kind": "share_weights", "initialization": "quantile", "rows_per_codebook": 8,
                                   "training": TRAINING}]),
    NamedRecipe("heads_and_ranks", [{"kind": "prune_structured", "structures": ["heads", "hidden_units"],
                                     "criterion": "magnitude", "round_to": 4, **CALIBRATION},
                                    {"kind": "factorize_low_rank", "rank_by": "energy", "whiten": True, **CALIBRATION},
                                    {"kind": "finetune", **TRAINING, "precision": "bf16"}], only="transformer"),
    NamedRecipe("spatial_ranks", [{"kind": "factorize_low_rank", "convolutions": "spatial", "rank_by": "budget",
                                   "whiten": True, **CALIBRATION}, {"kind": "quantize_float", "format": "fp16"}],
                only="cnn"),
    NamedRecipe("symmetric_int4", [{"kind": "prune_n_m", "axis": "output", "criterion": "wanda", **CALIBRATION},
                                   {"kind": "quantize_int4", "method": "hqq", "bits": 3, "group_size": 16}]),
)  # fmt: skip
"""What the list for GPUs leaves at its default, a few values at a time."""
OTHERWISE = [
    pytest.param(model, recipe, id=f"{recipe.name}-{model}", marks=[] if recipe.name in QUICK else [pytest.mark.long])
    for recipe in OTHER_OPTIONS
    for model in MODELS
    if recipe.only in (None, model)
]
Made = tuple[Program | FileProgram, list[dict[str, Any]]]


def run(model: str, recipe: NamedRecipe, device: torch.device, directory: Path) -> Made:
    program, examples = open_world(MODELS[model])
    original = program.copy()
    target = Target(device="cuda", runtime="torch") if recipe.in_torch else Target()
    checked = Recipe.model_validate_json(json.dumps({"steps": recipe.steps, "data": DATA}))
    make_repeatable(1, checked.seed)
    directory.mkdir()
    facts = []
    made: Program | FileProgram = program
    for step in checked.steps:
        assert made is program
        program.device = device
        context = Context(0, 1, directory, examples, lambda *_, **__: None, target=target, open_original=original.copy)
        # On the CPU torch would take a kernel for attention that rounds otherwise.
        with sdpa_kernel(SDPBackend.MATH):
            outcome = TECHNIQUES[step.kind].run(program, step, context)
        facts.append(outcome.facts)
        made = outcome.program
        program = made if isinstance(made, Program) else program
    assert device_of(program.module) == CPU
    return made, facts


def tensors(program: Program) -> dict[str, Tensor]:
    encodings = {
        f"{name} {field}": value
        for name, encoding in program.encodings.items()
        for field, value in vars(encoding).items()
        if isinstance(value, Tensor)
    }
    masks = {f"{name} mask": mask for name, mask in program.masks.items()}
    return {**program.module.state_dict(), **masks, **encodings}


@pytest.mark.parametrize(("model", "recipe"), [*CHOSEN, *OTHERWISE])
def test_a_recipe_on_a_device_leaves_what_it_leaves_on_the_cpu(model: str, recipe: NamedRecipe, tmp_path: Path) -> None:
    with autocast_as_on_cuda():
        expected, facts = run(model, recipe, CPU, tmp_path / "cpu")
    with simulated_device() as simulated:
        made, facts_there = run(model, recipe, DEVICE, tmp_path / "device")
    assert simulated.num_operators > 0 or not recipe.computes
    assert facts_there == facts
    if isinstance(expected, FileProgram):
        assert isinstance(made, FileProgram)
        assert made.path.read_bytes() == expected.path.read_bytes()
        return
    assert isinstance(made, Program)
    found, wanted = tensors(made), tensors(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in found.items() if isinstance(tensor, RemoteTensor)]
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
