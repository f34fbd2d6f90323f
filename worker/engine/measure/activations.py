"""Statistics of what flows into layers, gathered batch by batch: the seam for every technique that looks at data.

    found = collect(program, ["fc1", "conv2"], batches, lambda layer: Gram(layer))
    found["fc1"].matrix          # X^T X of everything that went into fc1

Only the accumulators stay in memory: the inputs of one layer for one batch are handed over and forgotten. Layers are
`nn.Linear` and `nn.Conv1d/2d/3d` with any groups, padding and dilation (`can_collect`). Their inputs come as the rows
that the layer multiplies by its flattened weight: `weight.reshape(out, -1)` has the same columns in the same order.
A layer that is called several times sees all its calls. Layers that share one weight share one accumulator. Padding
tokens are not known as such and count like any others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.devices import device_of, move
from worker.engine.programs.capture import evaluating
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_ROW_NUMBERS = 2**22
"""Numbers in the unfolded rows that are made at once: 16 MiB."""


class Accumulator(Protocol):
    """What `collect` feeds."""

    def add(self, rows: Tensor) -> None:
        """Take float32 rows (groups, rows, features); groups is 1 unless the layer is a grouped convolution.

        features = weight[0].numel(). Group g feeds the g-th block of out / groups rows of the weight.
        """


A = TypeVar("A", bound=Accumulator)


class Gram:
    """Sums X^T X over all rows: twice this, up to damping, is the Hessian of a layer's squared output error."""

    def __init__(self, layer: nn.Module) -> None:
        groups, features = row_shape(layer)
        self.matrix = torch.zeros(groups, features, features, device=device_of(layer))
        """float32 (groups, features, features), on the layer's device."""
        self.magnitudes = torch.zeros(groups, features, dtype=torch.float64, device=device_of(layer))
        """Sum of |x| over the rows, (groups, features)."""
        self.num_rows = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (groups, rows, features)."""
        self.matrix.baddbmm_(rows.transpose(1, 2), rows)
        self.magnitudes += rows.abs().sum(1, dtype=torch.float64)
        self.num_rows += rows.shape[1]


class FeatureNorms:
    """Sums the squares of each input feature: their root is the norm that Wanda scores weights with."""

    def __init__(self, layer: nn.Module) -> None:
        self.squares = torch.zeros(*row_shape(layer), dtype=torch.float64, device=device_of(layer))
        """(groups, features)."""
        self.num_rows = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (groups, rows, features)."""
        self.squares += rows.square().sum(1, dtype=torch.float64)
        self.num_rows += rows.shape[1]


def can_collect(layer: nn.Module) -> bool:
    """Whether a layer's inputs can be seen as rows that it multiplies by its weight."""
    return isinstance(layer, LAYERS)


def row_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (groups, features) of a layer's rows."""
    assert isinstance(layer, LAYERS), f"{type(layer).__name__} has no rows"
    return getattr(layer, "groups", 1), layer.weight.shape[1:].numel()


def collect(
    program: Program,
    layer_names: Iterable[str],
    batches: Iterable[Sequence[Tensor]],
    make_accumulator: Callable[[nn.Module], A],
) -> dict[str, A]:
    """Run the batches (each the inputs of one call) in eval mode and return each layer's accumulator by its name.

    An accumulator of a layer that no batch reached has seen nothing. They come back on the program's device.
    """
    layers = dict(program.module.named_modules())
    chosen = {name: layers[name] for name in layer_names}
    with on_device(program) as device, evaluating(program):
        found = make_accumulators(chosen, make_accumulator)
        with torch.inference_mode(), watching(chosen, found):
            for inputs in batches:
                program.module(*move(inputs, device))
    return found


def make_accumulators(layers: dict[str, nn.Module], make: Callable[[nn.Module], A]) -> dict[str, A]:
    """Return one accumulator per layer, the same one for layers that share their weight."""
    made: dict[int, A] = {}
    found: dict[str, A] = {}
    for name, layer in layers.items():
        key = id(layer.weight)
        if key not in made:
            made[key] = make(layer)
        found[name] = made[key]
    return found


@contextmanager
def watching(layers: dict[str, nn.Module], accumulators: dict[str, A]) -> Iterator[None]:
    """Within it, feed the inputs of every call of the layers to their accumulators."""

    def watch(accumulator: A) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            for rows in iterate_rows(layer, args[0].detach()):
                accumulator.add(rows)

        return hook

    handles = [layer.register_forward_pre_hook(watch(accumulators[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def iterate_rows(layer: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the rows (groups, rows, features) of one call in pieces of bounded size."""
    if isinstance(layer, nn.Linear):
        flat = inputs.reshape(-1, inputs.shape[-1])
        for piece in flat.split(max(1, MAX_ROW_NUMBERS // max(1, flat.shape[1]))):
            yield piece.float().unsqueeze(0)
        return
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    rank = len(layer.kernel_size)
    if inputs.ndim == rank + 1:
        inputs = inputs.unsqueeze(0)
    groups, features = row_shape(layer)
    positions = max(1, inputs[0, 0].numel())
    for piece in inputs.split(max(1, MAX_ROW_NUMBERS // (positions * features * groups))):
        yield _unfold(layer, piece.float(), groups)


def _unfold(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, groups: int) -> Tensor:
    # As a convolution itself does it: pad, then one window per output position, kernel positions last.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = functional.pad(inputs, tuple(layer._reversed_padding_repeated_twice), mode=mode)
    rank = len(layer.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (batch, channels, *positions, *kernel) -> (groups, batch and positions, channels / groups and kernel)
    batch, channels, *rest = windows.shape
    split = windows.reshape(batch, groups, channels // groups, *rest)
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return split.permute(order).reshape(groups, -1, layer.weight[0].numel())
