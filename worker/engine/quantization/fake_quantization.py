"""8-bit arithmetic simulated in floating point, trainable (Jacob et al. 2018), and its conversion to real integers.

A weight is rounded to its symmetric grid in every forward pass, an activation to an unsigned 8-bit grid whose range
is a moving average while it is learned and fixed afterwards. Gradients pass the rounding unchanged and stop where a
value was cut off (straight-through estimator).
"""

import copy
from collections.abc import Collection
from typing import cast

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators that ONNX knows as (De)QuantizeLinear
from torch import Tensor, fx, nn

from worker.engine.quantization.int8_grid import largest_code

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGING = 0.05
"""Weight of a new batch in the moving range."""
NUM_LEVELS = 255
SMALLEST_RANGE = 1e-6


class FakeActivation(nn.Module):
    """Rounds to unsigned 8 bits. The range always holds zero, and zero is exact."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.learning = True
        """Whether the range moves in training mode."""

    def grid(self) -> tuple[float, int]:
        """Return scale and zero point: value = (code - zero point) * scale, codes from 0 to 255."""
        scale = max(float(self.high) - float(self.low), SMALLEST_RANGE) / NUM_LEVELS
        return scale, round(min(max(-float(self.low) / scale, 0), NUM_LEVELS))

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid; in training mode the range moves first."""
        if self.training and self.learning:
            self.observe(x)
        # The same arithmetic as in `grid`, left on the device: to read the range back, the host would wait for it.
        low, high = self.low.double(), self.high.double()
        scale = (high - low).clamp(min=SMALLEST_RANGE) / NUM_LEVELS
        zero = (-low / scale).clamp(0, NUM_LEVELS).round()
        kept = x.clamp((0 - zero) * scale, (NUM_LEVELS - zero) * scale)
        rounded = ((x.detach() / scale).round() + zero).clamp(0, NUM_LEVELS)
        return kept + ((rounded - zero) * scale - kept).detach()

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of a batch; the first sets it."""
        low, high = self.bounds(x.float())
        share = torch.where(self.seen, AVERAGING, 1.0).to(self.low.dtype)
        self.low.lerp_(low, share)
        self.high.lerp_(high, share)
        self.seen.fill_(True)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range of a batch, zero included."""
        return x.min().clamp(max=0), x.max().clamp(min=0)


class FakeWeights(nn.Module):
    """A linear layer or convolution that computes with its weight rounded to the 8-bit (or 7-bit) grid."""

    def __init__(self, layer: nn.Module, *, bits: int, per_channel: bool) -> None:
        super().__init__()
        self.layer = layer
        self._limit, self._per_channel = largest_code(bits), per_channel

    def scales(self) -> Tensor:
        """Return the scales, (channels, 1, ...) or (1, 1, ...)."""
        weight = cast(Tensor, self.layer.weight).detach()
        axes = tuple(range(1 if self._per_channel else 0, weight.ndim))
        scales = weight.abs().amax(axes, keepdim=True) / self._limit
        return torch.where(scales > 0, scales, torch.ones_like(scales))

    def codes(self) -> Tensor:
        """Return the integers (int8), of the weight's shape."""
        weight = cast(Tensor, self.layer.weight).detach()
        return (weight / self.scales()).round().clamp(-self._limit, self._limit).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """Compute with the rounded weight."""
        weight = cast(Tensor, self.layer.weight)
        rounded = weight + (self.codes() * self.scales() - weight).detach()
        return _compute(self.layer, x, rounded)


class StoredActivation(nn.Module):
    """The same rounding by integer operators, which the exporter writes as QuantizeLinear and DequantizeLinear."""

    def __init__(self, source: FakeActivation) -> None:
        super().__init__()
        self._scale, self._zero = source.grid()

    def forward(self, x: Tensor) -> Tensor:
        """Round to uint8 and back."""
        operators = torch.ops.quantized_decomposed
        grid = (self._scale, self._zero, 0, NUM_LEVELS, torch.uint8)
        result: Tensor = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *grid), *grid)
        return result


class StoredWeights(nn.Module):
    """The same layer with its weight as int8 codes and scales."""

    def __init__(self, source: FakeWeights) -> None:
        super().__init__()
        # The layer's own weight must not be exported beside its codes.
        self.layer = copy.deepcopy(source.layer)
        del self.layer.weight
        self._linear = isinstance(source.layer, nn.Linear)
        codes, scales = source.codes(), source.scales().flatten()
        if len(scales) == 1:
            scales = scales.expand(len(codes)).contiguous()
        # A linear weight is stored as (inputs, outputs): nothing stands between it and the multiplication.
        self.register_buffer("codes", codes.T.contiguous() if self._linear else codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(len(scales), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Compute with the weight that the codes stand for."""
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zeros, 1 if self._linear else 0, -127, 127, torch.int8
        )
        if not self._linear:
            return _compute(self.layer, x, weight)
        product: Tensor = x @ weight
        bias = cast(Tensor | None, self.layer.bias)
        return product if bias is None else product + bias


def simulate(module: fx.GraphModule, skip: Collection[str], *, bits: int, per_channel: bool) -> fx.GraphModule:
    """Return a module that shares all parameters with `module` and simulates integers.

    Rounded are the weights of linear layers and convolutions, their inputs, and the outputs of convolutions (behind
    their ReLU), so that integers can flow from convolution to convolution.
    """
    result = fx.GraphModule(module, copy.deepcopy(module.graph))
    layers = dict(result.named_modules())
    quantized = [
        node
        for node in result.graph.nodes
        if node.op == "call_module"
        and isinstance(layers[str(node.target)], (*CONVOLUTIONS, nn.Linear))
        and str(node.target) not in skip
    ]
    on_grid: dict[fx.Node, fx.Node] = {}
    for node in quantized:
        source = node.args[0]
        if not _is_on_grid(source, set(on_grid.values())):
            if source not in on_grid:
                on_grid[source] = _insert(result, source, len(on_grid))
            node.replace_input_with(source, on_grid[source])
        if isinstance(layers[str(node.target)], CONVOLUTIONS):
            end = node
            if len(node.users) == 1 and _is_relu(user := next(iter(node.users)), layers):
                end = user
            if end not in on_grid:
                others = list(end.users)
                on_grid[end] = _insert(result, end, len(on_grid))
                for other in others:
                    other.replace_input_with(end, on_grid[end])
    for name in {str(node.target) for node in quantized}:
        _put(result, name, FakeWeights(layers[name], bits=bits, per_channel=per_channel))
    result.recompile()
    return result


def convert(simulated: fx.GraphModule) -> fx.GraphModule:
    """Return a module that holds and computes with integers: exactly the trained codes and ranges."""
    result = fx.GraphModule(simulated, copy.deepcopy(simulated.graph))
    for name, layer in list(result.named_modules()):
        if isinstance(layer, FakeActivation):
            _put(result, name, StoredActivation(layer))
        elif isinstance(layer, FakeWeights):
            _put(result, name, StoredWeights(layer))
    return result.eval()


def find_activations(simulated: nn.Module) -> list[FakeActivation]:
    """Return the simulated activations."""
    return [layer for layer in simulated.modules() if isinstance(layer, FakeActivation)]


def find_layers(simulated: nn.Module) -> dict[str, FakeWeights]:
    """Return the simulated layers by their names."""
    return {name: layer for name, layer in simulated.named_modules() if isinstance(layer, FakeWeights)}


def _compute(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    assert isinstance(layer, CONVOLUTIONS)
    return layer._conv_forward(x, weight, layer.bias)  # type: ignore[no-any-return]


def _insert(module: fx.GraphModule, after: fx.Node, index: int) -> fx.Node:
    name = f"activation_range_{index}"
    module.add_submodule(name, FakeActivation())
    with module.graph.inserting_after(after):
        return module.graph.call_module(name, (after,))


def _put(module: fx.GraphModule, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


def _is_relu(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(layers[str(node.target)], (nn.ReLU, nn.ReLU6))
    return node.op == "call_function" and str(node.target) in ("aten.relu.default", "aten.relu_.default")


def _is_on_grid(node: fx.Node, rounded: set[fx.Node]) -> bool:
    """Return whether a value is a rounded one, at most moved around since."""
    while node not in rounded:
        moves = node.op == "call_function" and str(node.target).split(".")[-2:-1] in (
            ["max_pool2d"],
            ["reshape"],
            ["view"],
        )
        if not moves:
            return False
        node = cast(fx.Node, node.args[0])
    return True
