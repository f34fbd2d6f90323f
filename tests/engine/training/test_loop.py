"""The training loop: schedule, decay, masks, keep_best, determinism, divergence, on real handwritten digits."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

from app.recipes.data import Data
from app.recipes.facts import TensorFacts
from app.recipes.training import Finetune
from worker.engine.errors import StepFailed
from worker.engine.programs.program import Program, Signature
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.loop import Trained, learning_rate, train

ID = "dst_" + "a" * 26


class Digits(nn.Module):
    """A small CNN for 8x8 digits, with everything training must get right: batch norm, dropout, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = torch.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return (self.fc(self.drop(torch.flatten(x, 1))),)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> BoundExamples:
    digits = load_digits()
    directory = tmp_path_factory.mktemp("digits")
    np.savez_compressed(
        directory / "digits.npz", image=digits.images.astype(np.uint8)[:, :, :, None], label=digits.target
    )
    data = Data.model_validate(
        {
            "dataset_id": ID,
            "task": "classification",
            "label_column": "label",
            "inputs": {"x": {"column": "image", "layout": "nhwc_to_nchw", "scale": 1 / 16}},
        }
    )
    return open_examples(data, {ID: (directory / "digits.npz", "npz")}, digits_program().signature, 0, directory)


def digits_program() -> Program:
    torch.manual_seed(0)
    signature = Signature(
        (TensorFacts(name="x", dtype="float32", shape=("batch", 1, 8, 8)),),
        (TensorFacts(name="logits", dtype="float32", shape=("batch", 10)),),
        None,
    )
    return Program(fx.symbolic_trace(Digits()).eval(), signature, "eval")


def run(program: Program, examples: BoundExamples, seed: int = 0, **spec: Any) -> tuple[Trained, list[tuple[Any, ...]]]:
    reports: list[tuple[Any, ...]] = []
    step = Finetune.model_validate({"kind": "finetune", "epochs": 2, "learning_rate": 0.01, **spec})
    trained = train(
        program,
        examples,
        step,
        seed=seed,
        report=lambda fraction, message="", **m: reports.append((fraction, message, m)),
    )
    return trained, reports


def state_bytes(program: Program) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in program.module.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns_real_digits(examples: BoundExamples, optimizer: str) -> None:
    program = digits_program()
    trained, reports = run(
        program, examples, optimizer=optimizer, epochs=4, learning_rate=0.01 if optimizer == "adamw" else 0.1
    )
    assert trained.quality_before.value < 0.3
    assert trained.quality_after.value > 0.9
    assert trained.last_loss < trained.first_loss / 3
    assert (trained.epochs_run, trained.steps_run) == (4, 4 * (trained.num_training // 64))
    assert trained.num_training == examples.set_apart().num_training < examples.num_training
    assert not any(layer.training for layer in program.module.modules())
    fractions = [fraction for fraction, _, _ in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert set(reports[-1][2]) == {"loss", "learning_rate", "step", "epoch", "accuracy"}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(examples: BoundExamples) -> None:
    first, second, other = digits_program(), digits_program(), digits_program()
    run(first, examples, seed=3)
    torch.rand(7)  # what happened before must not matter
    run(second, examples, seed=3)
    run(other, examples, seed=4)
    assert state_bytes(first) == state_bytes(second)
    assert state_bytes(first) != state_bytes(other)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_pruned_weights_stay_exactly_zero(examples: BoundExamples, optimizer: str) -> None:
    program = digits_program()
    generator = torch.Generator().manual_seed(1)
    parameters = dict(program.module.named_parameters())
    for name in ("conv.weight", "fc.weight"):
        program.masks[name] = torch.rand(parameters[name].shape, generator=generator) > 0.7
    program.apply_masks()
    before = {name: parameters[name].detach().clone() for name in program.masks}
    run(program, examples, optimizer=optimizer)
    for name, mask in program.masks.items():
        weight = parameters[name].detach()
        assert not weight[~mask].any()
        assert (weight[mask] != before[name][mask]).any()


def test_the_best_weights_are_kept_with_their_batch_norm_statistics(examples: BoundExamples) -> None:
    program = digits_program()
    run(program, examples, epochs=3)
    start = state_bytes(program)
    # A learning rate that can only do harm: nothing beats the start, so the start must come back whole.
    trained, _ = run(program, examples, optimizer="sgd", learning_rate=5.0, schedule="constant", warmup_fraction=0.0)
    assert trained.best_epoch == 0
    assert trained.quality_after == trained.quality_before
    assert state_bytes(program) == start
    careless, _ = run(program, examples, optimizer="sgd", learning_rate=5.0, schedule="constant", keep_best=False)
    assert careless.quality_after.value < careless.quality_before.value
    assert careless.best_epoch == careless.epochs_run
    assert state_bytes(program) != start


def test_max_steps_ends_the_run_within_an_epoch(examples: BoundExamples) -> None:
    trained, _ = run(digits_program(), examples, epochs=5, max_steps=7)
    assert (trained.steps_run, trained.epochs_run) == (7, 1)


def test_a_diverging_run_names_the_step(examples: BoundExamples) -> None:
    program = digits_program()
    with torch.no_grad():
        program.module.get_parameter("fc.weight").fill_(float("inf"))
    with pytest.raises(StepFailed) as caught:
        run(program, examples)
    assert caught.value.code in ("training_diverged", "output_not_finite")
    with pytest.raises(StepFailed, match=r"at step \d+ of \d+ with learning rate 10") as caught:
        run(
            digits_program(), examples, optimizer="sgd", learning_rate=10.0, gradient_clip_norm=None, epochs=100,
            schedule="constant", warmup_fraction=0.0, weight_decay=1.0, max_steps=400,
        )  # fmt: skip
    assert caught.value.code == "training_diverged"
    assert "learning_rate" in caught.value.fix


def test_biases_and_norms_do_not_decay(examples: BoundExamples) -> None:
    program = digits_program()
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.fill_(0.5)
    # Without gradients only decay moves weights: a loss that depends on nothing.
    step = Finetune.model_validate(
        {"kind": "finetune", "weight_decay": 0.5, "max_steps": 3, "keep_best": False, "schedule": "constant"}
    )
    train(
        program, examples, step, seed=0, report=lambda *_, **__: None,
        loss=lambda outputs, _: (outputs[0] * 0).sum(),
    )  # fmt: skip
    values = {name: parameter.detach().unique().tolist() for name, parameter in program.module.named_parameters()}
    assert {name for name, value in values.items() if value == [0.5]} == {
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "fc.bias",
    }
    assert all(value[0] < 0.5 for name, value in values.items() if name in ("conv.weight", "fc.weight"))


def test_tied_weights_are_trained_as_one(examples: BoundExamples) -> None:
    program = digits_program()
    twin = nn.Linear(128, 10)
    program.module.add_submodule("twin", twin)
    twin.weight = program.module.get_submodule("fc").weight  # type: ignore[assignment]
    program.masks["twin.weight"] = torch.zeros(10, 128, dtype=torch.bool)
    run(program, examples, max_steps=2, keep_best=False)
    assert not program.module.get_parameter("fc.weight").any()


@given(
    num_steps=st.integers(1, 500), warmup=st.floats(0, 0.5), peak=st.floats(1e-5, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_rate_rises_to_its_peak_and_never_rises_again(
    num_steps: int, warmup: float, peak: float, schedule: str
) -> None:
    step = Finetune.model_validate(
        {"kind": "finetune", "learning_rate": peak, "warmup_fraction": warmup, "schedule": schedule}
    )
    rates = [learning_rate(step, index, num_steps) for index in range(num_steps)]
    top = round(warmup * num_steps)
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if top < num_steps:
        assert rates[top] == pytest.approx(peak)
    if schedule == "cosine" and num_steps - top > 20:
        assert rates[-1] < peak * 0.01
