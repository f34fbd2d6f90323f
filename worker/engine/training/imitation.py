"""The loss against a teacher's outputs: softened classes, values, or directions, by what the output means."""

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.errors import RecipeRefused
from worker.engine.training.examples import BoundExamples
from worker.engine.training.features import relative_error
from worker.engine.training.losses import IGNORED_LABEL, align_classes, shift_tokens


def imitate(
    examples: BoundExamples,
    outputs: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    labels: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return how far a model's outputs are from the teacher's, differentiable in `outputs`.

    Class scores: T^2 KL(teacher || student) of both softened by the temperature (Hinton et al. 2015), the mean over the
    positions that count. Regression: mean squared error. Embedding: cosine distance plus relative squared error. Task
    `none`: vectors are taken for class scores, as in measuring agreement, anything else by relative squared error; all
    outputs count unless `recipe.data.output` names one.
    """
    index = examples.output_index
    mine, theirs = outputs[index], wanted[index]
    if examples.task == "classification":
        assert labels is not None
        check = examples.needs_check(labels)
        (scores, classes), (soft, _) = (align_classes(each, labels, check=check) for each in (mine, theirs))
        return soft_class_loss(scores, soft, temperature, classes != IGNORED_LABEL)
    if examples.task == "language_modeling":
        assert labels is not None
        check = examples.needs_check(labels)
        (scores, tokens), (soft, _) = (shift_tokens(each, labels, check=check) for each in (mine, theirs))
        return soft_class_loss(scores, soft, temperature, tokens != IGNORED_LABEL)
    if examples.task == "regression":
        return functional.mse_loss(mine.float(), theirs.float())
    if examples.task == "embedding":
        flat, goal = mine.float().flatten(1), theirs.float().flatten(1)
        return (1 - functional.cosine_similarity(flat, goal)).mean() + relative_error(flat, goal)
    chosen = [index] if examples.output_is_named else range(len(outputs))
    losses = [
        soft_class_loss(outputs[each], wanted[each], temperature)
        if outputs[each].ndim == 2 and outputs[each].shape[1] > 1
        else relative_error(outputs[each].float(), wanted[each].float())
        for each in chosen
        if outputs[each].is_floating_point()
    ]
    if not losses:
        raise RecipeRefused(
            "the outputs to learn from are whole numbers, which training cannot move",
            code="output_not_trainable",
            fix="Name an output of floating-point numbers in recipe.data.output.",
        )
    return torch.stack(losses).mean()


def soft_class_loss(scores: Tensor, wanted: Tensor, temperature: float, kept: Tensor | None = None) -> Tensor:
    """Return T^2 KL of softened scores (..., classes), the mean over the positions (...) that are `kept`, or all.

    One score per position is the logit of a yes. Where none is kept the loss is zero.
    """
    scores, wanted = scores.float() / temperature, wanted.float() / temperature
    if scores.shape[-1] == 1:
        scores, wanted = (torch.cat([torch.zeros_like(each), each], -1) for each in (scores, wanted))
    if kept is None:
        kept = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    # Scores that do not count become equal on both sides. To pick out the others, the host would wait for their number.
    mine, theirs = (each.masked_fill(~kept[..., None], 0.0).log_softmax(-1) for each in (scores, wanted))
    divergence = functional.kl_div(mine, theirs, reduction="sum", log_target=True)
    return temperature**2 * divergence / kept.sum().clamp(min=1)
