"""A training step tells the device what to do and asks it for nothing: the host runs ahead and is never waited for."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.recipes.metrics import Quality
from app.recipes.recipe import KINDS
from app.recipes.training import TrainingSettings
from tests.engine.simulated_device import DEVICE, simulated_device
from tests.engine.techniques.learning import (
    bind,
    context,
    make_cnn,
    make_zoo,
    open_gpt,
    open_pruned_cnn,
    random_examples,
)
from worker.engine import devices
from worker.engine.devices import CPU, fast_products, move_batch, pin_batch
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.program import Program
from worker.engine.quantization.fake_quantization import simulate
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training import loop
from worker.engine.training.examples import BoundExamples
from worker.engine.training.features import Pair, Pairs, relative_error
from worker.engine.training.losses import count_classes
from worker.engine.training.prefetch import prefetch

COMMON: dict[str, Any] = {"batch_size": 48, "learning_rate": 0.01, "gradient_clip_norm": 1.0, "keep_best": False}
World = tuple[Program, BoundExamples]


@pytest.fixture(autouse=True)
def _one_thread_that_reports_nothing_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "REPORT_INTERVAL_SECONDS", 1e9)


def open_tokens(directory: Path) -> World:
    return open_gpt(directory, 480)


def open_vit(directory: Path) -> World:
    program = make_zoo("vit")
    return program, random_examples(program, directory, 480, task="none")


def train_once(world: World, kind: str, **spec: Any) -> int:
    """Return how often the host waited for the device."""
    program, examples = world
    teacher = program.copy()
    step = KINDS[kind].model_validate({"kind": kind, **COMMON, **spec})
    program.device = DEVICE
    with simulated_device() as simulated:
        TECHNIQUES[kind].run(program, step, context(examples, teacher))
    assert simulated.num_operators > 0
    return simulated.num_waits


CASES: dict[str, tuple[Callable[[Path], World], str, dict[str, Any]]] = {
    "classes, pruned": (open_pruned_cnn, "finetune", {"accumulate": 2}),
    "tokens": (open_tokens, "finetune", {"optimizer": "sgd"}),
    "a teacher's classes and layers": (open_pruned_cnn, "distill", {"hidden_weight": 1.0, "attention_weight": 1.0}),
    "a teacher's tokens": (open_tokens, "distill", {}),
    "a teacher's tokens inside": (open_vit, "distill", {"hidden_weight": 1.0, "attention_weight": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_more_steps_make_the_host_wait_no_more_often(case: str, tmp_path: Path) -> None:
    make, kind, spec = CASES[case]
    waits = [train_once(make(tmp_path), kind, **spec, max_steps=num_steps) for num_steps in (2, 6)]
    assert waits[0] == waits[1] > 0


def test_nor_do_steps_that_know_the_teachers_answers_already(tmp_path: Path) -> None:
    size = 300
    per_epoch = open_pruned_cnn(tmp_path)[1].num_training // size
    waits = [
        train_once(open_pruned_cnn(tmp_path), "distill", epochs=2, batch_size=size, max_steps=per_epoch + more)
        for more in (1, 3)
    ]
    assert waits[0] == waits[1] > 0


def test_features_of_padded_tokens_are_compared_without_waiting() -> None:
    mine, theirs = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    padding = torch.arange(5) < torch.tensor([[5], [2], [0]])
    pairs = Pairs([Pair("a", "a", channels_first=False, has_positions=True)])
    with simulated_device() as simulated:
        far = [each.to(DEVICE) for each in (mine, theirs, padding)]
        hidden = pairs.compare_hidden([far[0]], [far[1]], far[2])
        attention = pairs.compare_attention([far[0]], [far[1]], far[2])
        assert simulated.num_waits == 0
        assert float(hidden) == pytest.approx(float(relative_error(mine[padding], theirs[padding])), rel=1e-5)
        assert float(attention) > 0


def test_nor_does_simulated_rounding(tmp_path: Path) -> None:
    waits = []
    for num_steps in (2, 6):
        program, examples = open_pruned_cnn(tmp_path)
        program.device = DEVICE
        settings = TrainingSettings.model_validate({**COMMON, "max_steps": num_steps})
        simulated = simulate(program.module, (), bits=8, per_channel=True)
        with simulated_device() as device:
            loop.train(program, examples, settings, seed=0, report=lambda *_, **__: None, module=simulated)
        waits.append(device.num_waits)
    assert waits[0] == waits[1] > 0


def test_losses_are_read_before_too_many_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = train_once(open_pruned_cnn(tmp_path), "finetune", max_steps=7)
    monkeypatch.setattr(loop, "MAX_UNREAD", 2)
    assert train_once(open_pruned_cnn(tmp_path), "finetune", max_steps=7) == few + 3


@pytest.mark.parametrize(("device", "num_left"), [(CPU, 6), (DEVICE, 0)])
def test_a_diverged_run_names_its_step_however_late_it_is_noticed(
    device: torch.device, num_left: int, tmp_path: Path
) -> None:
    program, examples = open_pruned_cnn(tmp_path)
    program.device = device
    settings = TrainingSettings.model_validate({**COMMON, "max_steps": 9, "gradient_clip_norm": None})
    losses = iter([1.0, 1.0, float("inf"), *[float("nan")] * 6])
    where = simulated_device() if device == DEVICE else nullcontext()
    with where, pytest.raises(StepFailed, match="the loss became inf at step 3 of 9") as caught:
        loop.train(
            program, examples, settings, seed=0, report=lambda *_, **__: None,
            loss=lambda outputs, _: outputs[0].sum() * 0 + next(losses),
        )  # fmt: skip
    assert caught.value.code == "training_diverged"
    assert len(list(losses)) == num_left, "all steps were told to the device before; the CPU is asked at once"


def test_a_label_without_a_class_is_found_on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = make_cnn(4)
    rows = {"image": np.zeros((40, 1, 8, 8), np.float32), "label": np.full(40, 10)}
    examples = bind(
        program, tmp_path, rows, {"image": 1.0}, task="classification", label_column="label",
        evaluation_fraction=0.1,
    )  # fmt: skip
    program.device = DEVICE
    refused_at: list[str] = []
    check = BoundExamples.check_labels

    def note(own: BoundExamples, labels: Tensor) -> None:
        try:
            check(own, labels)
        except RecipeRefused:
            refused_at.append(f"{labels.device} {threading.current_thread().name}")
            raise

    monkeypatch.setattr(BoundExamples, "check_labels", note)
    quality = Quality(metric="accuracy", value=0.0, higher_is_better=True, num_examples=1, standard_error=0.0)
    monkeypatch.setattr(loop, "_measure", lambda *_: quality)
    settings = TrainingSettings.model_validate(COMMON)
    with simulated_device(), pytest.raises(RecipeRefused) as caught:
        loop.train(program, examples, settings, seed=0, report=lambda *_, **__: None)
    assert caught.value.code == "label_out_of_range"
    assert refused_at == ["cpu prefetch"]


@pytest.mark.parametrize(
    ("task", "shape", "labels", "expected"),
    [
        ("classification", ("batch", 10), (4,), 10),
        ("classification", ("batch", 10), (4, 1), 10),
        ("classification", ("batch", 1), (4,), 2),
        ("classification", ("batch",), (4,), 2),
        ("classification", ("batch", 5, "h", "w"), (4, 8, 8), 5),
        ("classification", ("batch", "t", 5), (4, 7), 5),
        ("classification", ("batch", 7, 5), (4, 7), 5),
        ("classification", ("batch", 5, "t"), (4, 5), None),  # either axis may have the classes
        ("classification", ("batch", "c"), (4,), None),
        ("language_modeling", ("batch", "t", 50), (4, 7), 50),
        ("regression", ("batch", 10), (4, 10), None),
    ],
)
def test_classes_are_counted_where_the_shapes_tell(
    task: Any, shape: tuple[Any, ...], labels: tuple[int, ...], expected: int | None
) -> None:
    assert count_classes(task, shape, labels) == expected


def test_batches_are_pinned_by_the_thread_that_reads_them_and_sent_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def pin(tensor: Tensor) -> Tensor:
        calls.append(("pin", threading.current_thread().name))
        return tensor.clone()

    def send(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        calls.append(("send", str(device), non_blocking))
        return tensor

    monkeypatch.setattr(devices, "copies_from_pinned_memory", lambda _: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", send)
    batch = (torch.ones(2, 3),), torch.zeros(2)
    with prefetch(pin_batch(each, DEVICE) for each in [batch]) as pinned:
        for each in pinned:
            move_batch(each, DEVICE)
    assert calls == [("pin", "prefetch")] * 2 + [("send", str(DEVICE), True)] * 2


def test_tf32_holds_for_the_steps_alone_and_on_gpus_alone(tmp_path: Path) -> None:
    backends: Any = torch.backends

    def read() -> tuple[object, ...]:
        # Both of torch's settings: whatever reads the older one raises where the newer one says otherwise.
        newer = (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
        return (
            *newer,
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    with fast_products(torch.device("cuda"), tf32=True):
        assert read() == ("tf32", "tf32", True, True, "high")
    before = read()
    assert before == ("ieee", "none", False, False, "highest")
    with fast_products(CPU, tf32=False):
        assert read() == before
    program, examples = open_pruned_cnn(tmp_path)
    step = KINDS["finetune"].model_validate({"kind": "finetune", "precision": "tf32"})
    with pytest.raises(RecipeRefused) as caught:
        TECHNIQUES["finetune"].run(program, step, context(examples))
    assert caught.value.code == "tf32_needs_gpu"
