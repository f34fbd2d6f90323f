"""The weights that unstructured pruning may zero, which of them it keeps, and the masks that remember it.

Scores are float32 arrays of the weight's shape, larger is kept. What an earlier step pruned is scored below everything
(`PRUNED`), so masks only ever grow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.program import Program

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *RECURRENT)
PRUNED = -1.0
"""The score of a weight that is already pruned; all others are >= 0."""
NUM_NAMED = 10
"""Layers named in a warning."""


@dataclass(frozen=True)
class Weight:
    """A weight that may be pruned."""

    name: str
    """Of the parameter."""
    layer_name: str
    layer: nn.Module
    parameter: nn.Parameter


@dataclass(frozen=True)
class Found:
    """What a step may prune in a program, and what it leaves dense."""

    weights: tuple[Weight, ...]
    left: dict[str, str] = field(default_factory=dict)
    """Layer left dense -> why."""
    kinds: str = "linear, convolution or recurrent"
    """Of the layers that were looked for."""

    def capability(self, kind: str) -> Capability:
        """Return what `inspect` answers."""
        layers = tuple(dict.fromkeys(weight.layer_name for weight in self.weights))
        missing = explain(self.left)
        if not layers:
            missing = f"there are no {self.kinds} layers with a weight of their own" + (
                f"; {missing}" if missing else ""
            )
        return Capability(kind=kind, applicable=bool(layers), layers=layers, missing=missing or None)


def find_weights(program: Program, layers: tuple[type[nn.Module], ...] = LAYERS) -> Found:
    """Return the weights of these kinds of layers, each once, and the layers left dense with the reason.

    A weight that an embedding shares is left: its rows are looked up, not multiplied.
    """
    embeddings = {
        id(parameter)
        for layer in program.module.modules()
        if isinstance(layer, nn.Embedding)
        for parameter in layer.parameters()
    }
    found: list[Weight] = []
    left: dict[str, str] = {}
    seen: set[int] = set()
    for layer_name, layer in program.module.named_modules():
        if isinstance(layer, RECURRENT) and not issubclass(type(layer), layers):
            left[layer_name] = "it is recurrent: the activations inside it cannot be seen"
        if not isinstance(layer, layers):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            if id(parameter) in embeddings:
                left[layer_name] = "an embedding shares its weight"
                continue
            seen.add(id(parameter))
            found.append(Weight(f"{layer_name}.{name}", layer_name, layer, parameter))
    return Found(tuple(found), left)


def check_skipped(program: Program, skip_layers: Iterable[str]) -> None:
    """Raise RecipeRefused where `skip_layers` names what the model does not have."""
    unknown = sorted(set(skip_layers) - {name for name, _ in program.module.named_modules()})
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")


def choose_weights(program: Program, found: Found, skip_layers: Sequence[str]) -> tuple[Weight, ...]:
    """Return the found weights without the skipped layers. Raises where a skipped layer is unknown or none is left."""
    check_skipped(program, skip_layers)
    weights = tuple(weight for weight in found.weights if weight.layer_name not in skip_layers)
    if not weights:
        layers = sorted({weight.layer_name for weight in found.weights})
        raise StepFailed(
            f"no weights are left to prune: the model's prunable layers are {layers}, "
            f"skipped are {sorted(set(skip_layers))}" + (f"; {explain(found.left)}" if found.left else ""),
            code="nothing_to_prune",
        )
    return weights


def score_magnitude(program: Program, weight: Weight) -> Tensor:
    """Return |w|; what is pruned already is PRUNED, so that it goes before zeros that happen to be there."""
    return mark_pruned(program, weight, weight.parameter.detach().abs().float())


def mark_pruned(program: Program, weight: Weight, scores: Tensor) -> Tensor:
    """Return the scores with PRUNED where an earlier step pruned."""
    mask = program.masks.get(weight.name)
    return scores if mask is None else scores.masked_fill(~mask, PRUNED)


def keep_largest(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Return a mask that drops exactly round(sparsity * n) of n scores, or all those below zero if they are more.

    The smallest go; among equals, the earlier.
    """
    count = max(round(sparsity * scores.size), int((scores < 0).sum()))
    kept = np.ones(scores.size, dtype=bool)
    if count == 0:
        return kept
    limit = np.partition(scores, count - 1)[count - 1]
    below = scores < limit
    kept[below] = False
    ties = np.flatnonzero(scores == limit)[: count - int(below.sum())]
    kept[ties] = False
    return kept


def set_mask(program: Program, weight: Weight, kept: Tensor) -> float:
    """Zero what is not kept, in place, and remember it. What was pruned before stays pruned.

    Returns the relative squared error of the weight that this makes: the share of its squares that goes.
    """
    kept = kept.reshape(weight.parameter.shape).to(device=weight.parameter.device, dtype=torch.bool)
    old = program.masks.get(weight.name)
    mask = kept if old is None else kept & old
    program.masks[weight.name] = mask
    with torch.no_grad():
        squares = weight.parameter.square()
        total = float(squares.sum(dtype=torch.float64))
        lost = float(squares.masked_fill_(mask, 0.0).sum(dtype=torch.float64))
        weight.parameter.mul_(mask)
    return lost / total if total else 0.0


def share_masked(program: Program, weight: Weight) -> float:
    """Return the share of a weight's numbers that its mask keeps at zero."""
    return float((~program.masks[weight.name]).double().mean())


def tell_effect(program: Program, weight: Weight, error: float, step: int) -> LayerEffect:
    """Return what the mask that a weight has now did to it; `error` is what `set_mask` returned."""
    return LayerEffect(
        step=step, layer=weight.layer_name, choice=f"sparsity {share_masked(program, weight):.4g}",
        metric="weight_error", effect=error, chosen=True,
    )  # fmt: skip


def count_zeros(weights: Iterable[Weight]) -> int:
    """Return how many of these weights are zero."""
    return sum(int((weight.parameter == 0).sum()) for weight in weights)


def count_facts(weights: Sequence[Weight]) -> dict[str, float | int | str | bool | None]:
    """Return the facts that every kind of unstructured pruning reports."""
    zeros, total = count_zeros(weights), sum(weight.parameter.numel() for weight in weights)
    return {
        "sparsity": zeros / total,
        "weights_zeroed": zeros,
        "weights_prunable": total,
        "layers_pruned": len({weight.layer_name for weight in weights}),
    }


def warn(weights: Sequence[Weight], left: dict[str, str]) -> list[str]:
    """Return what every kind of unstructured pruning must say: where zeros do not help, and what died or was left."""
    zeros, total = count_zeros(weights), sum(weight.parameter.numel() for weight in weights)
    warnings = [
        f"{zeros} of {total} prunable weights are zero now. A dense file stores zeros like any other number and a "
        "dense runtime multiplies by them: neither size nor speed changes by this step alone. Only the `packed` "
        "artifact, which a recipe makes by default unless it ends in an integer model, leaves them out of the file; it "
        "is no faster either."
    ]
    empty = [weight.name for weight in weights if not bool(weight.parameter.any())]
    if empty:
        warnings.append(f"Every weight is zero in: {name_some(empty)}.")
    if left:
        warnings.append(f"Left dense: {explain(left)}.")
    return warnings


def explain(left: dict[str, str]) -> str:
    """Return "a, b: reason; c: reason", each reason once."""
    layers: dict[str, list[str]] = {}
    for name, reason in left.items():
        layers.setdefault(reason, []).append(name)
    return "; ".join(f"{name_some(names)}: {reason}" for reason, names in layers.items())


def name_some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{', '.join(names[:NUM_NAMED])}{more}"
