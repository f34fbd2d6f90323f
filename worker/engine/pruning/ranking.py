"""Which channels matter least: importance of units, and how many of each group to remove."""

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.programs.program import Program
from worker.engine.pruning.groups import CONVOLUTIONS, ChannelGroup, Slot
from worker.engine.training.examples import BoundExamples


def score_units(group: ChannelGroup, saliency: dict[str, Tensor]) -> np.ndarray:
    """Return the importance of every unit of a group: the mean over its layers, each scaled to a mean of one.

    `saliency` maps parameter names to non-negative numbers per weight.
    """
    scores = np.zeros(group.num_channels)
    for slot in group.slots:
        for name in ("weight", "bias") if not slot.is_input else ("weight",):
            values = saliency.get(f"{slot.name}.{name}")
            if values is None:
                continue
            per_channel = _sum_by_channel(slot, values).double().numpy()[slot.channels]
            total = np.zeros(group.num_channels)
            np.add.at(total, slot.roots, per_channel)
            if total.mean() > 0:
                scores += total / total.mean()
    return np.asarray(scores[group.units].mean(axis=1))


def _sum_by_channel(slot: Slot, values: Tensor) -> Tensor:
    """Sum weights over everything but the channels the slot speaks of."""
    layer = slot.layer
    if values.ndim == 1:
        return values
    if not isinstance(layer, CONVOLUTIONS):
        return values.flatten(1).sum(1) if not slot.is_input else values.sum(0)
    if layer.transposed:
        axis = 0 if slot.is_input else 1
        return values.transpose(0, axis).flatten(1).sum(1)
    if not slot.is_input:
        return values.flatten(1).sum(1)
    # (outputs, inputs of one group, ...): each group of outputs reads its own inputs.
    grouped = values.unflatten(0, (layer.groups, -1)).flatten(3).sum(3) if values.ndim > 2 else values[None, :, :]
    return grouped.sum(1).flatten()


def measure_magnitude(module: nn.Module) -> dict[str, Tensor]:
    """Return the square of every weight: summed over a group, this ranks by its L2 norm."""
    return {name: parameter.detach().square().cpu() for name, parameter in module.named_parameters()}


def measure_taylor(
    program: Program, examples: BoundExamples, *, num_batches: int, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Return |w * dL/dw| of every weight, summed over batches of training data."""
    module = program.module.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    done = 0
    while done < num_batches:
        for inputs, labels in examples.training_batches(batch_size, seed=seed + done):
            assert labels is not None, "the recipe's validation asks for labels"
            module.zero_grad(set_to_none=True)
            examples.loss(module(*inputs), labels).backward()
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    total[name] += (parameter.detach() * parameter.grad).abs()
            done += 1
            if done == num_batches:
                break
    module.zero_grad(set_to_none=True)
    return total


def choose_channels(
    groups: list[ChannelGroup], scores: list[np.ndarray], *, ratio: float, scope: str, round_to: int
) -> dict[str, np.ndarray]:
    """Return the channels to remove for the root of every group that loses any.

    The count that stays in a group is the multiple of `round_to` (and of its unit) nearest to the asked one, at least
    one multiple, at most what there is.
    """
    if scope == "global" and groups:
        flat = np.concatenate(scores)
        sizes = np.concatenate([np.full(len(g.units), g.units.shape[1]) for g in groups])
        order = np.argsort(flat, kind="stable")
        removed = np.cumsum(sizes[order]) <= ratio * sizes.sum() + 1e-9
        drop = np.zeros(len(flat), dtype=bool)
        drop[order[removed]] = True
        bounds = np.cumsum([len(g.units) for g in groups])[:-1]
        wanted = [int((~part).sum()) * g.units.shape[1] for part, g in zip(np.split(drop, bounds), groups, strict=True)]
    else:
        wanted = [(1 - ratio) * group.num_channels for group in groups]
    chosen = {}
    for group, score, want in zip(groups, scores, wanted, strict=True):
        size = group.units.shape[1]
        step = int(np.lcm(size, round_to))
        keep = max(round(want / step), 1) * step
        if keep >= group.num_channels:
            continue
        weakest = np.argsort(score, kind="stable")[: (group.num_channels - keep) // size]
        chosen[group.root_name] = np.sort(group.units[weakest].ravel())
    return chosen
