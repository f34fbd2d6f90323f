"""Fine-tuning on real handwritten digits: it recovers what pruning cost, and says so when it does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from app.recipes.data import Data
from app.recipes.pruning import PruneMagnitude, PruneStructured
from app.recipes.training import Finetune
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import finetune, prune_magnitude, prune_structured
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.quality import evaluate_module

ID = "dst_" + "a" * 26


class Digits(nn.Module):
    """A small CNN with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.dropout, self.fc = nn.Dropout(0.1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        x = torch.relu(self.norm2(self.conv2(x))).mean((2, 3))
        return self.fc(self.dropout(x))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, BoundExamples]:
    """Return a CNN for digits, trained by `finetune` itself from its exported random start, and the data."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("digits")
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Digits().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(exported, directory / "digits.pt2")
    (directory / "work").mkdir()
    program = open_program(directory / "digits.pt2", directory / "work")
    table = load_digits()
    np.savez(directory / "digits.npz", image=table.images.astype(np.uint8)[:, None], label=table.target)
    data = Data.model_validate(
        {
            "dataset_id": ID,
            "task": "classification",
            "label_column": "label",
            "inputs": {program.signature.inputs[0].name: {"column": "image", "scale": 1 / 16}},
        }
    )
    examples = open_examples(data, {ID: (directory / "digits.npz", "npz")}, program.signature, 0, directory)
    tune(program, examples, epochs=5, learning_rate=0.01)
    assert accuracy(program, examples) > 0.95
    return program, examples


def context(examples: BoundExamples) -> Context:
    return Context(0, 1, Path(), examples, lambda *_, **__: None)


def tune(program: Program, examples: BoundExamples, **spec: Any) -> Outcome:
    step = Finetune.model_validate({"kind": "finetune", "epochs": 3, "learning_rate": 0.005, **spec})
    return finetune.run(program, step, context(examples))


def accuracy(program: Program, examples: BoundExamples) -> float:
    return evaluate_module(program.module.eval(), examples, 64).value


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_recovers_what_structured_pruning_cost(optimizer: str, digits: tuple[Program, BoundExamples]) -> None:
    original, examples = digits
    step = PruneStructured.model_validate({"kind": "prune_structured", "ratio": 0.5})
    small = prune_structured.run(original.copy(), step, context(examples)).program
    assert isinstance(small, Program)
    pruned = accuracy(small, examples)
    outcome = tune(small, examples, epochs=8, optimizer=optimizer, learning_rate=0.02 if optimizer == "adamw" else 0.1)
    recovered = accuracy(small, examples)
    assert pruned < 0.9
    assert recovered > 0.95
    assert outcome.facts["quality_before"] < outcome.facts["quality_after"]  # type: ignore[operator]
    assert outcome.facts["quality_after"] == pytest.approx(accuracy(small, examples.set_apart()))
    assert outcome.facts["epochs_run"] == 8


def test_pruned_weights_stay_pruned_and_masks_are_exact(digits: tuple[Program, BoundExamples]) -> None:
    original, examples = digits
    program = original.copy()
    step = PruneMagnitude.model_validate({"kind": "prune_magnitude", "sparsity": 0.8})
    prune_magnitude.run(program, step, context(examples))
    before = {name: mask.clone() for name, mask in program.masks.items()}
    pruned = accuracy(program, examples)
    tune(program, examples)
    assert accuracy(program, examples) > pruned
    zeros = total = 0
    for name, mask in before.items():
        weight = program.module.get_parameter(name).detach()
        assert torch.equal(program.masks[name], mask)
        assert not weight[~mask].any()
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert zeros == round(0.8 * total)


def test_the_same_seed_gives_the_same_bytes(digits: tuple[Program, BoundExamples]) -> None:
    original, examples = digits
    states = []
    for _ in range(2):
        program = original.copy()
        tune(program, examples, epochs=1, keep_best=False)
        states.append({name: value.numpy().tobytes() for name, value in program.module.state_dict().items()})
    assert states[0] == states[1]


def test_it_says_when_nothing_better_was_found(digits: tuple[Program, BoundExamples]) -> None:
    original, examples = digits
    program = original.copy()
    before = accuracy(program, examples)
    outcome = tune(program, examples, epochs=1, optimizer="sgd", learning_rate=5.0, schedule="constant")
    assert accuracy(program, examples) == before
    assert outcome.facts["best_epoch"] == 0
    assert any("nothing better than its start" in warning for warning in outcome.warnings)
    careless = tune(program, examples, epochs=1, optimizer="sgd", learning_rate=5.0, keep_best=False)
    assert any("ended worse than it began" in warning for warning in careless.warnings)


def test_capability_lists_the_layers(digits: tuple[Program, BoundExamples]) -> None:
    capability = finetune.inspect(digits[0])
    assert capability.applicable
    assert set(capability.layers) == {"conv1", "norm1", "conv2", "norm2", "fc"}
    assert capability.missing is None
