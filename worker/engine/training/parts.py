"""Cutting a batch into the parts that are computed one after the other, and each part into the shares of replicas."""

from collections.abc import Sequence

from torch import Tensor

from app.recipes.data import Task
from worker.engine.training.examples import Batch
from worker.engine.training.losses import count_targets


def split_batch(
    batch: Batch, task: Task, num_parts: int, num_shares: int = 1, share: int = 0
) -> list[tuple[Batch, float]]:
    """Return one share of every part, each with its weight in the batch's mean loss.

    Weights count what the loss is a mean over: examples, or the positions that are not ignored. Parts that hold none
    are left out, on all ranks alike. Every share of every part has at least one example.
    """
    num_rows = len(batch[0][0])
    assert num_rows >= num_shares, f"{num_rows} examples for {num_shares} shares"
    parts = _cut(batch, min(num_parts, num_rows // num_shares))
    shares = [_cut(part, num_shares) for part in parts]
    counts = [[_count(each, task) for each in cut] for cut in shares]
    total = sum(map(sum, counts))
    if total == 0:
        return [(_cut(batch, num_shares)[share], 1.0 / num_shares)]
    return [(cut[share], count[share] / total) for cut, count in zip(shares, counts, strict=True) if sum(count)]


def _cut(batch: Batch, num_pieces: int) -> list[Batch]:
    if num_pieces == 1:
        return [batch]
    inputs, labels = batch
    columns = [each.tensor_split(num_pieces) for each in inputs]
    answers: Sequence[Tensor | None] = [None] * num_pieces if labels is None else labels.tensor_split(num_pieces)
    return list(zip(zip(*columns, strict=True), answers, strict=True))


def _count(batch: Batch, task: Task) -> int:
    inputs, labels = batch
    return len(inputs[0]) if labels is None else count_targets(task, labels)
