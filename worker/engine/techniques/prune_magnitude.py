"""Set the smallest weights to zero and remember them as masks, so that training keeps them zero."""

import numpy as np
import torch
from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.pruning import PruneMagnitude
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.LSTM, nn.GRU, nn.RNN,
)  # fmt: skip


def inspect(program: Program) -> Capability:
    """Name the layers with prunable weights."""
    weights, tied = _find_weights(program)
    layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    missing = None
    if not layers:
        missing = "there are no linear, convolution or recurrent layers" + (
            " with a weight of their own" if tied else ""
        )
    elif tied:
        missing = f"left dense because an embedding shares their weight: {', '.join(tied)}"
    return Capability(kind="prune_magnitude", applicable=bool(layers), layers=layers, missing=missing)


def run(program: Program, step: PruneMagnitude, context: Context) -> Outcome:
    """Zero exactly the asked share of the prunable weights: those smallest in magnitude, the earlier one on a tie."""
    weights, tied = _find_weights(program)
    layers = {name.rpartition(".")[0] for name in weights}
    unknown = sorted(set(step.skip_layers) - {name for name, _ in program.module.named_modules()})
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    weights = {name: weight for name, weight in weights.items() if name.rpartition(".")[0] not in step.skip_layers}
    if not weights:
        raise StepFailed(
            f"no weights are left to prune: the model's prunable layers are {sorted(layers)}, "
            f"skipped are {sorted(set(step.skip_layers))}",
            code="nothing_to_prune",
        )
    scores = {name: _score(weight, program.masks.get(name)) for name, weight in weights.items()}
    if step.scope == "global":
        kept = _keep_largest(np.concatenate(list(scores.values())), step.sparsity)
        bounds = np.cumsum([score.size for score in scores.values()])[:-1]
        masks = dict(zip(scores, np.split(kept, bounds), strict=True))
    else:
        masks = {name: _keep_largest(score, step.sparsity) for name, score in scores.items()}
    for name, mask in masks.items():
        weight = weights[name]
        program.masks[name] = torch.from_numpy(mask).view(weight.shape).to(weight.device)
    program.apply_masks()
    context.report(1.0, f"{len(masks)} weights masked")

    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    warnings = [
        f"{zeros} of {total} prunable weights are zero now. A dense file stores zeros like any other number and a "
        "dense runtime multiplies by them: neither size nor speed changes by this step alone."
    ]
    empty = [name for name, weight in weights.items() if not bool(weight.any())]
    if empty:
        warnings.append(f"Every weight is zero in: {', '.join(empty[:10])}{' ...' if len(empty) > 10 else ''}.")
    if tied:
        warnings.append(f"Left dense because an embedding shares their weight: {', '.join(tied)}.")
    return Outcome(
        program=program,
        facts={
            "sparsity": zeros / total,
            "weights_zeroed": zeros,
            "weights_prunable": total,
            "layers_pruned": len({name.rpartition(".")[0] for name in weights}),
        },
        warnings=tuple(warnings),
    )


def _find_weights(program: Program) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Return the prunable parameters by name, each once, and the layers left out because an embedding shares them."""
    embeddings = {
        id(parameter)
        for layer in program.module.modules()
        if isinstance(layer, nn.Embedding)
        for parameter in layer.parameters()
    }
    found: dict[str, nn.Parameter] = {}
    tied: list[str] = []
    seen: set[int] = set()
    for layer_name, layer in program.module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            if id(parameter) in embeddings:
                tied.append(layer_name)
                continue
            seen.add(id(parameter))
            found[f"{layer_name}.{name}"] = parameter
    return found, tied


def _score(weight: Tensor, mask: Tensor | None) -> np.ndarray:
    """Return the magnitudes; what is pruned already comes first, before zeros that merely happen to be there."""
    score = weight.detach().abs().float()
    if mask is not None:
        score = score.masked_fill(~mask, -1.0)
    return score.flatten().cpu().numpy()


def _keep_largest(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Return a mask that drops exactly round(sparsity * n) scores, or those below zero if they are more."""
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
