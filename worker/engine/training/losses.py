"""What the labels of each task mean: the loss that training lowers, and how labels are brought into its form."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from app.recipes.data import Task
from worker.engine.errors import RecipeRefused

IGNORED_LABEL = -100
"""Positions with this label count neither in the loss nor in the quality (torch's convention)."""


def compute_loss(
    task: Task, output: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, check: bool = True
) -> Tensor:
    """Return the mean loss of one batch, differentiable in `output`; zero where all its labels are ignored.

    `label_smoothing` spreads that share of the probability over all classes (Szegedy et al. 2016). With `check` off,
    the caller knows that there is a class for each label: to see that from here, the host waits for the device.
    """
    if label_smoothing and task != "classification":
        raise RecipeRefused(
            f"label_smoothing is {label_smoothing:g}, which is for classification; the task is {task!r}",
            code="label_smoothing_needs_classes",
            fix="Leave label_smoothing at 0.",
        )
    if task == "classification":
        scores, classes = align_classes(output, labels, check=check)
        if scores.shape[-1] == 1:
            return _binary_loss(scores[:, 0].float(), classes, label_smoothing)
        return _class_loss(scores, classes, label_smoothing)
    if task == "language_modeling":
        scores, tokens = shift_tokens(output, labels, check=check)
        return _class_loss(scores.flatten(0, 1), tokens.flatten())
    if task == "regression":
        return functional.mse_loss(output.float(), align_values(output, labels))
    if task == "embedding":
        values = align_values(output, labels).flatten(1)
        return (1 - functional.cosine_similarity(output.flatten(1).float(), values)).mean()
    raise RecipeRefused(
        f"task {task!r} has no loss", code="no_loss", fix="Set recipe.data.label_column and recipe.data.task."
    )


def count_targets(task: Task, labels: Tensor) -> int:
    """Return over how many positions `compute_loss` takes the mean, for weighing the parts of a split batch."""
    if task == "language_modeling":
        labels = labels[:, 1:]
    elif task != "classification":
        return len(labels)
    return int((labels != IGNORED_LABEL).sum())


def _class_loss(scores: Tensor, classes: Tensor, label_smoothing: float = 0.0) -> Tensor:
    total = functional.cross_entropy(
        scores.float(), classes, ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (classes != IGNORED_LABEL).sum().clamp(min=1)


def _binary_loss(scores: Tensor, classes: Tensor, label_smoothing: float) -> Tensor:
    counted = classes != IGNORED_LABEL
    targets = classes.float().clamp(min=0) * (1 - label_smoothing) + label_smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def count_classes(task: Task, shape: Sequence[int | str], labels: Sequence[int]) -> int | None:
    """Return how many classes an output tells apart, given its shape (names stand for sizes that vary) and that of the
    labels; None where the task has no classes, or the shapes leave the class axis open."""
    if task == "language_modeling":
        return shape[-1] if isinstance(shape[-1], int) else None
    if task != "classification":
        return None
    if len(shape) == 1:
        return 2
    rest = labels[1:] if len(labels) != 2 or labels[1] != 1 else ()
    if len(shape) != len(rest) + 2:
        return None
    possible = {
        shape[axis]
        for axis, others in ((1, shape[2:]), (-1, shape[1:-1]))
        if all(isinstance(size, str) or size == want for size, want in zip(others, rest, strict=True))
    }
    size = possible.pop() if len(possible) == 1 else None
    return max(size, 2) if isinstance(size, int) else None


def check_range(task: Task, labels: Tensor, num_classes: int) -> None:
    """Refuse labels for which there is no class."""
    real = labels[labels != IGNORED_LABEL]
    if not real.numel() or 0 <= int(real.min()) <= int(real.max()) < num_classes:
        return
    lowest, highest = int(real.min()), int(real.max())
    if task == "language_modeling":
        token = highest if lowest >= 0 else lowest
        raise RecipeRefused(
            f"token {token} is outside the output's vocabulary of {num_classes}",
            code="label_out_of_range",
            fix=f"Tokens are numbered from 0, {IGNORED_LABEL} marks positions that do not count. Look at the "
            "label_column, and at whether the tokenizer is the model's.",
        )
    raise RecipeRefused(
        f"labels range from {lowest} to {highest}, the output tells {num_classes} classes apart",
        code="label_out_of_range",
        fix=f"Number the classes 0 to {num_classes - 1}, or name another output in recipe.data.output.",
    )


def align_classes(output: Tensor, labels: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """Return scores (positions, classes) and classes (positions), whether the class axis of `output` is 1 or last."""
    if output.ndim == 1:
        output = output[:, None]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    rest = labels.shape[1:]
    if output.ndim == labels.ndim + 1 and output.shape[2:] == rest:
        scores = output.movedim(1, -1)
    elif output.ndim == labels.ndim + 1 and output.shape[1:-1] == rest:
        scores = output
    else:
        raise _refuse(output, labels, "one class number per score vector")
    if check:
        check_range("classification", labels, max(scores.shape[-1], 2))
    return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)


def shift_tokens(output: Tensor, tokens: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """Return scores (examples, positions, vocabulary) and the token each position should predict: the next one."""
    if output.ndim != 3 or output.shape[:2] != tokens.shape or tokens.shape[1] < 2:
        raise _refuse(output, tokens, "scores (batch, tokens, vocabulary) and at least two tokens")
    if check:
        check_range("language_modeling", tokens, output.shape[-1])
    return output[:, :-1], tokens[:, 1:]


def align_values(output: Tensor, labels: Tensor) -> Tensor:
    """Return the labels in the output's shape; (n,) and (n, 1) are the same thing."""
    if output.shape != labels.shape and (output.shape[0] != labels.shape[0] or output.numel() != labels.numel()):
        raise _refuse(output, labels, "as many numbers per row as the output has")
    return labels.reshape(output.shape).to(torch.float32)


def _refuse(output: Tensor, labels: Tensor, expected: str) -> RecipeRefused:
    return RecipeRefused(
        f"labels of shape {tuple(labels.shape)} do not fit the output of shape {tuple(output.shape)}: "
        f"expected {expected}",
        code="labels_do_not_fit",
        fix="Name another output in recipe.data.output, another label_column, or another task.",
    )
