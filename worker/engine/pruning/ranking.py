"""Which units matter least: importance of the units of every group, and how many of each group to remove."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.engine.devices import move
from worker.engine.programs.placement import runs_on_device
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import ChannelGroup, Place
from worker.engine.training.examples import BoundExamples

Criterion = Literal["magnitude", "group_norm", "batch_norm_scale", "taylor"]
Scores = NDArray[np.float64]
Chosen = dict[str, NDArray[np.int64]]


def score_units(
    group: ChannelGroup, criterion: Criterion, saliency: dict[str, Tensor], module: nn.Module
) -> Scores | None:
    """Return the importance of every unit of a group, or None where the criterion says nothing about the group.

    `saliency` maps parameter names to non-negative numbers per weight. The norms are scaled to a mean of one on every
    place (an axis of a parameter), so that layers of any size compare; batch norm scales and Taylor's changes of the
    loss compare as they are.
    """
    places = _choose_places(group, criterion, saliency, module)
    if not places:
        return None
    scores = np.zeros(group.num_units)
    for place in places:
        values = _sum_by_unit(place, saliency[place.parameter], group.num_units)
        if criterion == "magnitude":
            values = np.sqrt(values)
        if criterion in ("magnitude", "group_norm") and values.mean() > 0:
            values = values / values.mean()
        if criterion == "batch_norm_scale":
            values = values / np.bincount(place.units, minlength=group.num_units)
        scores += values
    return scores / len(places) if criterion == "batch_norm_scale" else scores


def _choose_places(
    group: ChannelGroup, criterion: Criterion, saliency: dict[str, Tensor], module: nn.Module
) -> list[Place]:
    places = [place for place in group.places if place.parameter in saliency]
    if criterion == "magnitude":
        made = [p for p in places if p.roles & {"out", "free"} and saliency[p.parameter].ndim > 1]
        return made or places
    if criterion == "batch_norm_scale":
        return [
            place
            for place in places
            if place.parameter.endswith("weight")
            and isinstance(module.get_submodule(place.parameter.rpartition(".")[0]), nn.modules.batchnorm._BatchNorm)
        ]
    if criterion == "group_norm":
        # The size of an offset says nothing: a channel that a ReLU always silences has a large one, below zero.
        return [place for place in places if place.parameter.rpartition(".")[2] != "bias"] or places
    return places


def _sum_by_unit(place: Place, values: Tensor, num_units: int) -> Scores:
    flat = values.transpose(0, place.axis).flatten(1).sum(1) if values.ndim > 1 else values
    weights = flat.double().numpy()[place.positions]
    return np.bincount(place.units, weights=weights, minlength=num_units).astype(np.float64)


def measure_weights(module: nn.Module, criterion: Criterion) -> dict[str, Tensor]:
    """Return the square of every weight (its size for `batch_norm_scale`): summed, they rank by the L2 norm."""
    if criterion == "batch_norm_scale":
        return {name: parameter.detach().abs().cpu() for name, parameter in module.named_parameters()}
    return {name: parameter.detach().square().cpu() for name, parameter in module.named_parameters()}


@runs_on_device
def measure_taylor(
    program: Program, examples: BoundExamples, *, num_batches: int, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Return |w * dL/dw| of every weight, summed over batches of training data, on the CPU."""
    module = program.module.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    done = 0
    while done < num_batches:
        for inputs, labels in examples.training_batches(batch_size, seed=seed + done):
            assert labels is not None, "the recipe's validation asks for labels"
            module.zero_grad(set_to_none=True)
            examples.loss(module(*move(inputs, program.device)), labels.to(program.device)).backward()
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    total[name] += (parameter.detach() * parameter.grad).abs()
            done += 1
            if done == num_batches:
                break
    module.zero_grad(set_to_none=True)
    return {name: each.cpu() for name, each in total.items()}


def choose_units(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Scores],
    *,
    ratio: float,
    scope: Literal["global", "local"],
    round_to: int,
    full: dict[str, int] | None = None,
    savings: Sequence[float] | None = None,
) -> Chosen:
    """Return the units to remove of every group that loses any: a share `ratio` of the channels there once were.

    `full` gives the units that a group had at first, where earlier rounds removed some. The count that stays is the
    multiple of `round_to` channels nearest to the asked one, at least one multiple, at most what there is.
    `savings` gives what removing a unit of each group saves; `global` then goes by importance per saving, which is the
    greedy answer to the knapsack problem (as Shen et al., Structural Pruning via Latency-Saliency Knapsack, 2022).
    """
    full = full or {}
    sizes = [full.get(group.name, group.num_units) for group in groups]
    if scope == "global" and groups:
        widths = np.concatenate([np.full(group.num_units, group.unit_size) for group in groups])
        total = sum(size * group.unit_size for size, group in zip(sizes, groups, strict=True))
        per_saving = scores if savings is None else [s / saved for s, saved in zip(scores, savings, strict=True)]
        order = np.argsort(np.concatenate(per_saving), kind="stable")
        allowed = ratio * total - (total - widths.sum())
        drop = np.zeros(len(order), dtype=bool)
        drop[order[np.cumsum(widths[order]) <= allowed + 1e-9]] = True
        bounds = np.cumsum([group.num_units for group in groups])[:-1]
        wanted = [float((~part).sum()) for part in np.split(drop, bounds)]
    else:
        wanted = [(1 - ratio) * size for size in sizes]
    chosen: Chosen = {}
    for group, score, want in zip(groups, scores, wanted, strict=True):
        step = group.units_per_step(round_to)
        keep = max(int(want / step + 0.5), 1) * step
        if keep < group.num_units:
            chosen[group.name] = np.sort(np.argsort(score, kind="stable")[: group.num_units - keep])
    return chosen
