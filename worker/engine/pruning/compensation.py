"""Weights that make good what removed channels carried: the layers that read them lean on the channels that stay.

A layer y = W x loses the inputs R and keeps K. With G = X^T X over calibration examples, the weights on K that come
closest to the old outputs are W_K + W_R G_RK (G_KK + lambda I)^-1: the least-squares reconstruction of He et al.,
Channel Pruning for Accelerating Very Deep Neural Networks (2017), and Luo et al., ThiNet (2017), without a change of
which channels go. Layers are taken in order, each with the inputs that the adjusted layers before it make.

What is added makes the weights larger. Before a batch norm that changes nothing but the training to come, whose steps
count relative to the size of the weights: twice the square is half the learning rate (van Laarhoven, L2 Regularization
versus Batch and Weight Normalization, 2017). There the weights get the size back that those on K had, and the norm's
statistics follow.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from worker.engine.measure.activations import Gram, can_collect
from worker.engine.measure.walk import Walk
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import Channels
from worker.engine.pruning.removal import Chosen, Kept

DAMPING = 0.01
"""lambda, as a share of the mean diagonal of G_KK."""
Normalized = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def compensate(
    program: Program,
    channels: Channels,
    chosen: Chosen,
    batches: Sequence[Sequence[Tensor]],
    report: Callable[[float, str], None] = lambda *_: None,
) -> tuple[Program, int]:
    """Return a copy whose layers no longer need the chosen units, and how many layers were adjusted.

    It has the old shapes, with zeros where a removed unit is read: removing the units changes nothing any more. Linear
    layers and ungrouped convolutions are adjusted; others lose what they read. The width of a stream that norms read is
    not made good: without the units, the norms give other values.
    """
    adjusted = program.copy()
    wide = {group.name for group in channels.groups if group.structure == "width"}
    chosen = {name: units for name, units in chosen.items() if name not in wide}
    if not chosen:
        return adjusted, 0
    kept = Kept(channels.flow, channels, chosen)
    layers = dict(adjusted.module.named_modules())
    parameters = dict(adjusted.module.named_parameters())
    stays: dict[str, Tensor] = {}
    for (name, axis), roles in channels.flow.roles.items():
        owner, _, attribute = name.rpartition(".")
        layer, ids = layers.get(owner), channels.flow.tensors[name][axis]
        if "in" not in roles or ids is None or (mask := kept.mask(ids)).all():
            continue
        if attribute == "weight" and axis == 1 and layer is not None and _has_rows(layer):
            stays[owner] = torch.from_numpy(np.ascontiguousarray(mask)).to(adjusted.device)
        elif name in parameters:
            with torch.no_grad():
                parameters[name].index_fill_(axis, torch.from_numpy(np.flatnonzero(~mask)), 0.0)

    norms = _find_norms(adjusted.module, layers)

    def visit(grams: dict[str, Gram]) -> None:
        for name, gram in grams.items():
            weight = layers[name].weight
            with torch.no_grad():
                leaning = lean_on(weight, gram.matrix[0], stays[name])
                size = weight[:, stays[name]].norm()
                weight.copy_(leaning)
                if name in norms and leaning.norm() > 0:
                    _scale(layers[name], norms[name], float(size / leaning.norm()))

    Walk(adjusted, batches, list(stays), Gram).run(visit, report)
    return adjusted, len(stays)


def _find_norms(module: fx.GraphModule, layers: Mapping[str, nn.Module]) -> dict[str, Normalized]:
    """Return the batch norms with statistics that alone read what a convolution or linear layer makes, by its name."""
    calls = Counter(node.target for node in module.graph.nodes if node.op == "call_module")
    found = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or calls[node.target] > 1 or len(node.users) != 1:
            continue
        (reader,) = node.users
        norm = layers.get(str(reader.target)) if reader.op == "call_module" and calls[reader.target] == 1 else None
        if isinstance(norm, Normalized) and norm.running_mean is not None:
            found[str(node.target)] = norm
    return found


def _scale(layer: nn.Module, norm: Normalized, factor: float) -> None:
    """Scale what the layer makes, and the statistics of the norm that reads it: the norm's output stays what it was."""
    assert isinstance(layer.weight, Tensor)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layer.weight.mul_(factor)
    if isinstance(layer.bias, Tensor):
        layer.bias.mul_(factor)
    norm.running_mean.mul_(factor)
    norm.running_var.mul_(factor**2)


def _has_rows(layer: nn.Module) -> bool:
    return can_collect(layer) and getattr(layer, "groups", 1) == 1


def lean_on(weight: Tensor, gram: Tensor, stays: Tensor) -> Tensor:
    """Return the weight with zeros for the input channels that go, and the others adjusted.

    `weight` (out, in, ...), `gram` (features, features) of its flattened rows, `stays` (in,) bool. Where no channel was
    ever active, the others are left as they are.
    """
    rows = weight.detach().flatten(1)
    features = stays.repeat_interleave(rows.shape[1] // len(stays))
    own, cross = gram[features][:, features], gram[~features][:, features]
    result = torch.where(features, rows, 0.0)
    damping = DAMPING * own.diagonal().mean()
    if damping > 0:
        own = own + damping * torch.eye(len(own), device=own.device)
        result[:, features] += torch.linalg.solve(own, cross.T @ rows[:, ~features].T).T
    return result.reshape(weight.shape)
