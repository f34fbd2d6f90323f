"""Training from fresh weights: nothing of the old ones is left, zeros stay zero, free parameters are accounted for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes.training import Train
from tests.engine.techniques.learning import (
    context,
    digit_examples,
    make_cnn,
    make_zoo,
    random_examples,
    state_bytes,
)
from worker.engine.programs.program import Program
from worker.engine.techniques import train
from worker.engine.techniques.base import Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.fresh import reset_weights


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def learn(program: Program, examples: BoundExamples, seed: int = 0, **spec: Any) -> Outcome:
    step = Train.model_validate({"kind": "train", "epochs": 1, "learning_rate": 0.02, **spec})
    return train.run(program, step, context(examples, seed=seed))


def test_the_result_depends_on_the_seed_and_not_on_the_old_weights(tmp_path: Path) -> None:
    first, second, other = (make_cnn(4, seed=seed) for seed in (1, 2, 1))
    examples = digit_examples(first, tmp_path)
    for program, seed in ((first, 5), (second, 5), (other, 6)):
        outcome = learn(program, examples, seed, keep_best=False, max_steps=4)
        assert outcome.facts["parameters_reset"] == len(list(program.module.parameters()))
    assert state_bytes(first) == state_bytes(second)
    assert state_bytes(first) != state_bytes(other)


def test_new_weights_are_a_function_of_the_seed_alone() -> None:
    states = []
    for old, seed in ((1, 5), (2, 5), (1, 6)):
        program = make_cnn(4, seed=old)
        reset_weights(program, seed)
        states.append(program.module.get_parameter("convs.1.weight").detach().clone())
    assert torch.equal(states[0], states[1])
    assert not (states[0] == states[2]).any()


def test_pruned_weights_stay_zero(tmp_path: Path) -> None:
    program = make_cnn(4)
    name = "convs.1.weight"
    mask = torch.rand(program.module.get_parameter(name).shape) > 0.5
    program.masks[name] = mask
    learn(program, digit_examples(program, tmp_path), max_steps=4)
    weight = program.module.get_parameter(name).detach()
    assert not weight[~mask].any()
    assert (weight[mask] != 0).all()


@pytest.mark.parametrize("name", ["mlp", "vit", "gpt", "lstm_deep", "unet"])
def test_every_parameter_is_new_and_sensible(name: str) -> None:
    program = make_zoo(name)
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.fill_(77.0)
    fresh = reset_weights(program, 0)
    assert fresh.kept == []
    assert fresh.guessed == (["token", "position"] if name == "vit" else [])
    assert all(parameter.abs().max() < 6 for parameter in program.module.parameters())
    if name == "gpt":  # tied to the output layer, whose scale it takes
        assert program.module.get_parameter("tokens.weight").std() < 0.3
    if name == "lstm_deep":
        assert not program.module.get_parameter("embedding.weight")[0].any()


def test_what_was_guessed_and_kept_is_said(tmp_path: Path) -> None:
    program = make_zoo("vit")
    program.module.register_parameter("odd", torch.nn.Parameter(torch.tensor([3.0, 4.0])))
    examples = random_examples(program, tmp_path / "data", task="none")
    fresh = reset_weights(program, 0)
    assert fresh.kept == ["odd"]
    assert program.module.get_parameter("odd").tolist() == [3.0, 4.0]
    with pytest.raises(AssertionError, match="without labels"):
        learn(program, examples)


def test_capability_lists_the_layers() -> None:
    capability = train.inspect(make_cnn(4))
    assert (capability.kind, capability.applicable) == ("train", True)
    assert set(capability.layers) == {"convs.0", "convs.1", "norms.0", "norms.1", "fc"}
