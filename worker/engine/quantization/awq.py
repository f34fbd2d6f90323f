"""AWQ: scaling up the weights of important input channels before rounding, and the channels down where they are made.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (2023). The scale of a
channel is the mean magnitude of its input to a power; the power, and how far groups are clipped, are chosen by the
error of the layers' outputs. The scale can only be taken back where a norm or a linear layer makes the input and
nothing else reads it (`find_source`); elsewhere clipping is all that is left.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from worker.engine.measure.activations import Gram
from worker.engine.packing.encodings import Grouped
from worker.engine.programs.program import Program
from worker.engine.quantization.gptq import output_error
from worker.engine.quantization.grids import round_on, search_grid
from worker.engine.quantization.rounding import round_to_groups

NUM_POWERS = 10
_PASSING = {"relu", "relu_", "dropout", "clone", "alias", "detach", "contiguous", "to"}
"""Operators f with f(s * x) = s * f(x) for s > 0 that change no shape; dropout does nothing in eval mode."""


@dataclass(frozen=True)
class Rounded:
    """One layer's weight in few bits."""

    encoding: Grouped
    """Of the weight times the scales."""
    rtn_error: float
    """Squared output error over the calibration rows of rounding the weight as it is."""
    error: float
    """The same of this result; never larger."""


def round_by_clipping(weight: Tensor, gram: Gram, bits: int, group_size: int, *, symmetric: bool) -> Rounded:
    """Return the weight, (rows, ...), rounded with or without clipped groups: whichever has the smaller error."""
    ones = torch.ones(gram.matrix.shape[-1], device=gram.matrix.device)
    return _round_scaled(weight, ones, gram, bits, group_size, symmetric=symmetric)


def round_by_scaling(
    weights: list[Tensor], gram: Gram, bits: int, group_size: int, *, symmetric: bool
) -> tuple[list[Rounded], Tensor]:
    """Return the layers that share one input, rounded, and the scales (features,) by which the input must be divided.

    All ones where no scale helps.
    """
    features = gram.matrix.shape[-1]
    magnitudes = (gram.magnitudes[0] / max(gram.num_rows, 1)).float().clamp(min=1e-8)
    ones = torch.ones(features, device=gram.matrix.device)
    plain = sum(_rtn_error(weight, ones, gram, bits, group_size, symmetric) for weight in weights)
    best_error, best_scales = plain, ones
    for step in range(1, NUM_POWERS + 1):
        scales = magnitudes.pow(step / NUM_POWERS)
        scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(1e-4, 1e4)
        error = sum(_rtn_error(weight, scales, gram, bits, group_size, symmetric) for weight in weights)
        if error < best_error:
            best_error, best_scales = error, scales
    done = [_round_scaled(each, best_scales, gram, bits, group_size, symmetric=symmetric) for each in weights]
    return done, best_scales


def _rtn_error(weight: Tensor, scales: Tensor, gram: Gram, bits: int, group_size: int, symmetric: bool) -> float:
    matrix = weight.detach().float().reshape(weight.shape[0], -1)
    rounded = round_to_groups(matrix * scales, bits, group_size, symmetric=symmetric).decode() / scales
    return output_error(matrix - rounded, gram.matrix)


def _round_scaled(
    weight: Tensor, scales: Tensor, gram: Gram, bits: int, group_size: int, *, symmetric: bool
) -> Rounded:
    matrix = weight.detach().float().reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    plain = round_to_groups(matrix, bits, group_size, symmetric=symmetric)
    scaled = round_to_groups(matrix * scales, bits, group_size, symmetric=symmetric)
    # Errors of a scaled input weigh 1 / scale each.
    importance = gram.matrix.diagonal(dim1=1, dim2=2) / scales.square()
    padding = -columns % group_size
    groups = torch.nn.functional.pad(matrix * scales, (0, padding)).reshape(rows, -1, group_size)
    spread = importance.repeat_interleave(rows // len(importance), 0)
    spread = torch.nn.functional.pad(spread, (0, padding)).reshape(rows, -1, group_size)
    scale, zero = search_grid(groups, bits, symmetric=symmetric, importance=spread)
    clipped = replace(
        scaled,
        codes=round_on(groups, scale, zero, bits).to(torch.uint8).reshape(rows, -1)[:, :columns].contiguous(),
        scales=scale.squeeze(-1),
        zero_points=None if symmetric else zero.squeeze(-1).to(torch.uint8),
    )
    found = [(output_error(matrix - each.decode() / scales, gram.matrix), each) for each in (scaled, clipped)]
    error, encoding = min(found, key=lambda each: each[0])
    return Rounded(
        replace(encoding, shape=tuple(weight.shape)), output_error(matrix - plain.decode(), gram.matrix), error
    )


@dataclass(frozen=True)
class Source:
    """What makes the input of some linear layers, and of nothing else."""

    name: str
    layer: nn.Module


def find_source(program: Program, layers: list[str], changing: set[str]) -> Source | None:
    """Return the layer whose output, channel by channel, is all that the given linear layers read, or None.

    `layers` read the same value, `changing` are all the layers whose weights are being scaled with them.
    """
    modules = dict(program.module.named_modules())
    nodes = [node for node in program.module.graph.nodes if node.op == "call_module"]
    calls = [node for node in nodes if node.target in layers]
    if len(calls) != len(layers) or not all(isinstance(modules[name], nn.Linear) for name in layers):
        return None
    value = calls[0].args[0]
    readers = {node for node in calls if node.args[0] is value}
    if not isinstance(value, fx.Node) or set(value.users) != readers or len(readers) != len(calls):
        return None
    if {str(node.target) for node in readers} - changing:
        return None
    while _passes(value, modules):
        before = value.args[0]
        if not isinstance(before, fx.Node) or set(before.users) != {value}:
            return None
        value = before
    if value.op != "call_module" or sum(node.target == value.target for node in nodes) != 1:
        return None
    name, layer = str(value.target), modules[str(value.target)]
    if not isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.Linear)) or layer.weight is None:
        return None
    if not isinstance(layer, nn.Linear) and layer.weight.ndim != 1:
        return None
    parameters = list(layer.parameters(recurse=False))
    holders = [id(each) for module in modules.values() for each in module.parameters(recurse=False)]
    if any(holders.count(id(each)) > 1 for each in parameters):
        return None
    coded = program.encodings.keys() & {f"{name}.{each}" for each, _ in layer.named_parameters(recurse=False)}
    if any(not isinstance(program.encodings[each], Grouped) or not each.endswith(".weight") for each in coded):
        return None
    return Source(name, layer)


def divide_source(program: Program, source: Source, scales: Tensor) -> None:
    """Divide what a source puts out by scales, (features,), in place. Codes stay: their scales are divided."""
    name = f"{source.name}.weight"
    weight = source.layer.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        bias = getattr(source.layer, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.div_(scales)
        encoding = program.encodings.get(name)
        if encoding is None:
            weight.div_(scales if weight.ndim == 1 else scales[:, None])
            return
    assert isinstance(encoding, Grouped)
    program.encode(name, replace(encoding, scales=encoding.scales / scales[:, None].to(encoding.scales.device)))


def _passes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.ReLU, nn.Dropout, nn.Identity))
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.name.removeprefix("aten::") in _PASSING
