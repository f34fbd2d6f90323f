"""What 8 bits do to each layer: the error of its own output on example inputs, weights and activations rounded."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from app.recipes.metrics import LayerEffect
from worker.engine.programs.program import Program
from worker.engine.quantization.int8_grid import SMALLEST_STEP, Floats, round_to_int8

Activations = Literal["float", "per_tensor", "per_row", "per_row_symmetric"]
"""How a layer's inputs are rounded: not at all, to one range of 256 levels, or to one for every row (token), which may
be symmetric about zero."""
NUM_LEVELS = 255


def measure_int8_effects(
    program: Program,
    layers: Collection[str],
    inputs: Sequence[Tensor],
    *,
    bits: Callable[[nn.Module], int],
    per_channel: bool,
    activations: Callable[[nn.Module], Activations],
    rounded: Program | None = None,
    scales: Mapping[str, Floats] | None = None,
    step: int = 0,
) -> tuple[LayerEffect, ...]:
    """Return one effect for each of `layers`, in the order of the module; `bits` of a layer's weight, 8 or 7.

    Linear layers and convolutions are judged by their outputs without the bias, for the inputs that the float program
    gives them (ranges are those of these inputs); other layers by their weights. `rounded` has the weights that are
    stored where they are not simply the nearest codes (GPTQ), `scales` their grids.
    """
    effects: dict[str, LayerEffect] = {}
    sources = dict((rounded or program).module.named_modules())
    hooks = []

    def tell(name: str, metric: str, error: float, num_bytes: int) -> None:
        effects[name] = LayerEffect(
            step=step, layer=name, choice="int8", metric=metric, effect=error, weight_bytes=num_bytes, chosen=True
        )

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def measure(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            assert isinstance(layer.weight, Tensor)
            weight, num_bytes = _round_weight(sources[name], bits(layer), per_channel, (scales or {}).get(name))
            wanted = _apply(layer, given[0], layer.weight)
            made = _apply(layer, _round_inputs(given[0], activations(layer)), weight)
            tell(name, "layer_output_error", _relative(made - wanted, wanted), num_bytes)

        return measure

    module = program.module.eval()
    wanted = [(name, layer) for name, layer in module.named_modules() if name in layers]
    for name, layer in wanted:
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            hooks.append(layer.register_forward_pre_hook(watch(name)))
        else:
            weights = [each.detach() for each in layer.parameters() if each.ndim > 1]
            errors, num_bytes = [torch.zeros(())], 0
            for weight in weights:
                codes, grid = round_to_int8(weight.numpy(), 0, bits(layer))
                errors.append((torch.from_numpy(codes * grid) - weight).flatten())
                num_bytes += codes.nbytes + grid.nbytes
            flat = torch.cat([each.flatten() for each in weights]) if weights else torch.zeros(1)
            tell(
                name,
                "weight_error",
                _relative(torch.cat([each.reshape(-1) for each in errors]), flat),
                num_bytes,
            )
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(effects[name] for name, _ in wanted if name in effects)


def _apply(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer._conv_forward(x, weight, None)  # type: ignore[no-any-return]


def _round_weight(layer: nn.Module, bits: int, per_channel: bool, scales: Floats | None) -> tuple[Tensor, int]:
    assert isinstance(layer.weight, Tensor)
    codes, grid = round_to_int8(layer.weight.detach().numpy(), 0 if per_channel else None, bits, scales)
    return torch.from_numpy(codes * grid), codes.nbytes + grid.nbytes


def _round_inputs(x: Tensor, how: Activations) -> Tensor:
    """Round to 256 levels between the smallest and the largest value; zero is one of the levels."""
    if how == "float":
        return x
    if how == "per_row_symmetric":
        step = (x.abs().amax(-1, keepdim=True) / (NUM_LEVELS // 2)).clamp(min=SMALLEST_STEP)
        return (x / step).round() * step
    if how == "per_row":
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    else:
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / NUM_LEVELS).clamp(min=SMALLEST_STEP)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, NUM_LEVELS) - zero) * scale


def _relative(error: Tensor, wanted: Tensor) -> float:
    power = float(wanted.double().square().sum())
    return float(error.double().square().sum()) / power if power else 0.0
