"""The training loop's options: split batches, optimizers, schedules, precision, augmentation, patience, prefetching."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from app.recipes.training import Finetune
from tests.engine.techniques.learning import digit_examples, make_cnn, make_zoo, random_examples, state_bytes
from tests.engine.techniques.opening import open_module
from worker.engine.errors import RecipeRefused
from worker.engine.programs.program import Program
from worker.engine.training.augment import augment
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import Trained, learning_rate, train
from worker.engine.training.losses import IGNORED_LABEL, compute_loss
from worker.engine.training.prefetch import DEPTH, prefetch
from worker.engine.training.remembered import Remembered


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def fit(program: Program, examples: BoundExamples, **spec: Any) -> Trained:
    step = Finetune.model_validate({"kind": "finetune", "epochs": 1, "keep_best": False, **spec})
    return train(program, examples, step, seed=0, report=lambda *_, **__: None)


def test_a_split_batch_makes_the_same_step(tmp_path: Path) -> None:
    """Plain SGD shows the gradient. Padding is spread unevenly, so that a plain mean over the parts would be wrong."""
    start = make_zoo("gpt")
    for layer in start.module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    examples = random_examples(start, tmp_path / "data", 40, task="language_modeling")
    bound = examples._training[1]
    assert bound is not None
    original = type(bound).read

    def read(self: Any, rows: Any) -> Any:
        values = original(self, rows)
        for index, row in enumerate(rows):
            values[index, 2 + int(row) % 7 :] = IGNORED_LABEL
        return values

    type(bound).read = read  # type: ignore[method-assign]
    try:
        states = []
        for parts in (1, 3):
            program = start.copy()
            for module in program.module.modules():
                module.train(False)
            fit(program, examples, optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.5,
                gradient_clip_norm=None, batch_size=16, max_steps=1, accumulate=parts, schedule="constant")  # fmt: skip
            states.append({name: value.clone() for name, value in program.module.state_dict().items()})
    finally:
        type(bound).read = original  # type: ignore[method-assign]
    assert any((value - start.module.state_dict()[name]).abs().max() > 1e-4 for name, value in states[0].items())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_every_optimizer_learns(tmp_path: Path, optimizer: str) -> None:
    program = make_cnn(4)
    rate = 0.2 if optimizer == "sgd" else 0.01
    trained = fit(program, digit_examples(program, tmp_path), optimizer=optimizer, learning_rate=rate, epochs=2)
    assert trained.last_loss < 0.9 * trained.first_loss


def test_momentum_matters(tmp_path: Path) -> None:
    start = make_cnn(4)
    examples = digit_examples(start, tmp_path)
    states = []
    for momentum in (0.0, 0.9):
        program = start.copy()
        fit(program, examples, optimizer="sgd", momentum=momentum, max_steps=3)
        states.append(state_bytes(program))
    assert states[0] != states[1]


@given(num_steps=st.integers(1, 300), warmup=st.floats(0, 0.5), schedule=st.sampled_from(["linear", "step"]))
@settings(max_examples=60, deadline=None)
def test_linear_and_step_fall_as_they_say(num_steps: int, warmup: float, schedule: str) -> None:
    step = Finetune.model_validate(
        {"kind": "finetune", "learning_rate": 1.0, "warmup_fraction": warmup, "schedule": schedule}
    )
    top = round(warmup * num_steps)
    rates = [learning_rate(step, index, num_steps) for index in range(num_steps)][top:]
    assert rates == sorted(rates, reverse=True)
    for index, rate in enumerate(rates):
        done = index / (num_steps - top)
        wanted = 1 - done if schedule == "linear" else 10.0 ** -((done >= 0.5) + (done >= 0.75))
        assert rate == pytest.approx(wanted)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path: Path) -> None:
    start = make_cnn(4)
    examples = digit_examples(start, tmp_path)
    seen: set[torch.dtype] = set()
    program, plain = start.copy(), start.copy()
    hook = program.module.get_submodule("convs.1").register_forward_hook(
        lambda layer, _inputs, output: seen.add(output.dtype) if layer.training else None
    )
    trained = fit(program, examples, precision="bf16", learning_rate=0.01)
    hook.remove()
    fit(plain, examples, learning_rate=0.01)
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in program.module.state_dict().values()} <= {torch.float32, torch.int64}
    assert trained.last_loss < trained.first_loss
    assert state_bytes(program) != state_bytes(plain)


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Bilinear(8, 8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image.flatten(1))
        scores: Tensor = self.second(x, x)
        return scores


def test_an_operator_that_does_not_take_bf16_is_named(tmp_path: Path) -> None:
    program = open_module(_Bilinear(), (torch.zeros(2, 1, 8, 8),), tmp_path)
    examples = digit_examples(program, tmp_path / "data")
    with pytest.raises(
        RecipeRefused, match="does not compute in bfloat16: All tensors must have the same dtype"
    ) as got:
        fit(program, examples, precision="bf16", max_steps=1)
    assert (got.value.code, got.value.fix) == ("bf16_not_computable", "Set precision to 'fp32'.")
    fit(program, examples, max_steps=1)


def test_label_smoothing_is_the_mean_over_all_classes() -> None:
    scores, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, IGNORED_LABEL])
    got = compute_loss("classification", scores, labels, label_smoothing=0.2)
    logs = scores[:4].log_softmax(1)
    wanted = -(0.8 * logs[range(4), labels[:4]] + 0.2 * logs.mean(1)).mean()
    torch.testing.assert_close(got, wanted)
    yes = compute_loss("classification", torch.tensor([[2.0]]), torch.tensor([1]), label_smoothing=0.2)
    torch.testing.assert_close(
        yes, -(0.9 * torch.tensor(2.0).sigmoid().log() + 0.1 * torch.tensor(-2.0).sigmoid().log())
    )
    with pytest.raises(RecipeRefused, match="classification"):
        compute_loss("regression", scores, scores, label_smoothing=0.1)
    assert compute_loss("classification", scores, torch.full((5,), IGNORED_LABEL)) == 0


def test_flip_mirrors_some_and_crop_shifts_by_an_eighth() -> None:
    image = torch.arange(256.0).reshape(1, 1, 16, 16).expand(64, 2, 16, 16).contiguous()
    (flipped,), _ = augment((image,), None, ["flip"], (0, 1, 2))
    mirrored = (flipped == image.flip(-1)).flatten(1).all(1)
    assert ((flipped == image).flatten(1).all(1) ^ mirrored).all()
    assert 10 < int(mirrored.sum()) < 54
    (moved,), _ = augment((image,), None, ["crop"], (0, 1, 2))
    corners = {(int(value) // 16 - 5, int(value) % 16 - 5) for value in moved[:, 0, 5, 5]}
    assert {down for down, _ in corners} == {right for _, right in corners} == {-2, -1, 0, 1, 2}
    # A shift by (d, r) is that shift everywhere; beyond the border the image turns back.
    assert moved.unique().numel() <= 256
    assert (moved[:, 0] == moved[:, 1]).all()


def test_augmentation_moves_label_maps_along_and_is_seeded() -> None:
    image = torch.rand(8, 3, 16, 16)
    labels = (image[:, 0] * 100).long()
    (moved,), maps = augment((image,), labels, ["flip", "crop"], (3, 0, 0))
    assert maps is not None
    assert torch.equal((moved[:, 0] * 100).long(), maps)
    assert not torch.equal(moved, image)
    again, other = (augment((image,), labels, ["flip", "crop"], (3, 0, part))[0][0] for part in (0, 1))
    assert torch.equal(again, moved)
    assert not torch.equal(other, moved)
    with pytest.raises(RecipeRefused, match="cannot be moved"):
        augment((image,), labels[:, :4], ["flip"], (0,))
    with pytest.raises(RecipeRefused, match="4-d"):
        augment((torch.rand(4, 3),), None, ["flip"], (0,))


def test_augmented_training_has_the_same_bits_again(tmp_path: Path) -> None:
    start = make_cnn(4)
    examples = digit_examples(start, tmp_path)
    programs = [start.copy() for _ in range(3)]
    for program, kinds in zip(programs, (["flip", "crop"], ["flip", "crop"], []), strict=True):
        fit(program, examples, augmentations=kinds, max_steps=4)
    assert state_bytes(programs[0]) == state_bytes(programs[1]) != state_bytes(programs[2])


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    program = make_cnn(4)
    examples = digit_examples(program, tmp_path)
    fit(program, examples, epochs=3, learning_rate=0.02)
    trained = fit(program, examples, epochs=30, learning_rate=10.0, optimizer="sgd", schedule="constant",
                  keep_best=True, patience=2)  # fmt: skip
    assert trained.stopped_early
    assert trained.epochs_run == trained.best_epoch + 2 < 30
    with pytest.raises(ValidationError, match="keep_best"):
        Finetune.model_validate({"kind": "finetune", "patience": 2, "keep_best": False})


def test_prefetch_makes_items_ahead_and_no_further() -> None:
    """No clocks: the source waits for the consumer to be at work, which only a source in another thread can do."""
    working, made = threading.Event(), []

    def source() -> Iterator[int]:
        for index in range(20):
            if index == 1:
                assert working.wait(60)
            made.append(index)
            yield index

    with prefetch(source()) as items:
        assert next(items) == 0
        working.set()  # item 1 is being made only while we hold item 0
        assert list(items) == list(range(1, 20))
    made.clear()
    with prefetch(source()) as items:
        next(items)
    assert len(made) <= DEPTH + 3


def test_prefetch_ends_its_thread_and_passes_errors_on() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("row 7")

    before = threading.active_count()
    with pytest.raises(KeyError, match="row 7"), prefetch(source()) as items:
        assert list(items)
    with prefetch(iter(range(10**9))) as numbers:
        assert next(numbers) == 0
    assert threading.active_count() == before


def test_a_teacher_is_asked_once_about_each_row() -> None:
    asked: list[int] = []

    def teacher(rows: Tensor) -> tuple[Tensor, ...]:
        asked.append(len(rows))
        return (rows * 2,)

    remembered, rows = Remembered(teacher), torch.rand(6, 3)
    torch.testing.assert_close(remembered(rows)[0], rows * 2)
    shuffled = rows[[3, 1, 5]]
    torch.testing.assert_close(remembered(shuffled)[0], shuffled * 2)
    assert asked == [6]
    remembered(torch.rand(2, 3))
    assert asked == [6, 2]
    small = Remembered(teacher, limit_bytes=30)
    for _ in range(2):
        torch.testing.assert_close(small(rows)[0], rows * 2)
    assert asked == [6, 2, 6, 6]
