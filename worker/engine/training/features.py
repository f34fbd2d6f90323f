"""Inner features of two models: caught at named layers, paired, brought to one size, compared."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from worker.engine.errors import RecipeRefused

CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._AdaptiveAvgPoolNd,
)  # fmt: skip
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.rnn.RNNBase, nn.Sequential)
NUM_AUTOMATIC_PAIRS = 4
_TINY = 1e-6


class Taps:
    """The latest outputs of some layers of a module."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._caught: dict[str, Tensor] = {}

    def catch(self, name: str, output: Any) -> None:
        """Keep what a layer has just returned; of a recurrent layer, the sequence."""
        self._caught[name] = output[0] if isinstance(output, tuple) else output

    def take(self) -> list[Tensor]:
        """Return the outputs in the order of the names, in float32, and forget them."""
        caught = [self._caught[name].float() for name in self._names]
        self._caught.clear()
        return caught


@contextmanager
def tap(module: nn.Module, names: Sequence[str]) -> Iterator[Taps]:
    """Catch the outputs of the named layers as long as the block lasts."""
    taps = Taps(names)
    hooks = [
        module.get_submodule(name).register_forward_hook(
            lambda _layer, _inputs, output, name=name: taps.catch(name, output)
        )
        for name in dict.fromkeys(names)
    ]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def find_layers(module: fx.GraphModule) -> list[str]:
    """Return the names of the layers that the graph calls, in its order, each once."""
    return list(dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module"))


def check_layer(module: fx.GraphModule, name: str, whose: str) -> None:
    """Refuse a name that is no layer of the model."""
    known = find_layers(module)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise RecipeRefused(
            f"pairs names the layer {name!r}, which the {whose} does not have",
            code="unknown_layer",
            fix=f"Did you mean {' or '.join(map(repr, close))}?" if close else f"There are {', '.join(known[:20])}.",
        )


def choose_pairs(student: fx.GraphModule, teacher: fx.GraphModule) -> list[tuple[str, str]]:
    """Return up to four pairs of layers, evenly over the depth, the last included.

    Layers are the norms, in models without any the convolutions, linear and recurrent ones but the last, whose output
    is the model's. Where each of the student has a namesake and the teacher has no others, names pair; else depth does.
    """
    mine, theirs = _find_candidates(student), _find_candidates(teacher)
    if not mine or not theirs:
        return []
    count = min(NUM_AUTOMATIC_PAIRS, len(mine), len(theirs))
    chosen = [mine[(index + 1) * len(mine) // count - 1] for index in range(count)]
    if set(mine) == set(theirs):
        return [(name, name) for name in chosen]
    return list(zip(chosen, [theirs[(index + 1) * len(theirs) // count - 1] for index in range(count)], strict=True))


def _find_candidates(module: fx.GraphModule) -> list[str]:
    layers = find_layers(module)
    norms = [name for name in layers if isinstance(module.get_submodule(name), NORMS)]
    return norms or [name for name in layers if isinstance(module.get_submodule(name), WEIGHTED)][:-1]


@dataclass
class Pair:
    """Two layers whose outputs are compared. Shapes are those of one batch, the batch left out."""

    student: str
    teacher: str
    channels_first: bool
    has_positions: bool
    """Whether it gives maps or tokens, not one vector per example."""
    projection: nn.Linear | None = None
    """Student's width -> teacher's; on channels, hence a 1x1 convolution of maps."""

    @property
    def name(self) -> str:
        """Both names, or the one they share."""
        return self.student if self.student == self.teacher else f"{self.student}:{self.teacher}"


@dataclass
class Pairs:
    """The pairs of a run with what they learn."""

    pairs: list[Pair] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        """Return those of all projections."""
        return [each for pair in self.pairs if pair.projection is not None for each in pair.projection.parameters()]

    def compare_hidden(self, mine: list[Tensor], theirs: list[Tensor], padding: Tensor | None) -> Tensor:
        """Return the mean over the pairs of: squared difference, relative to the teacher's mean square.

        FitNets' hint loss (Romero et al. 2015), made free of the scale of the features.
        """
        losses = []
        for pair, own, other in zip(self.pairs, mine, theirs, strict=True):
            student, teacher = _fit_maps(pair, own, other)
            if pair.projection is not None:
                student = pair.projection(student)
            losses.append(relative_error(student, teacher, _real_positions(padding, student)))
        return torch.stack(losses).mean()

    def compare_attention(self, mine: list[Tensor], theirs: list[Tensor], padding: Tensor | None) -> Tensor:
        """Return the mean over the pairs that have positions of how differently these are weighed.

        Maps: the squared distance of the normalized energies over the channels (Zagoruyko and Komodakis 2017). Tokens:
        the divergence of their relations softmax(h h' / sqrt(width)) (after MiniLM, Wang et al. 2020).
        """
        losses = []
        for pair, own, other in zip(self.pairs, mine, theirs, strict=True):
            if not pair.has_positions:
                continue
            if pair.channels_first:
                student, teacher = (_energy(each) for each in _fit_maps(pair, own, other))
                losses.append((student - teacher).square().sum(1).mean())
            else:
                losses.append(_relation_loss(own.flatten(1, -2), other.flatten(1, -2), padding))
        return torch.stack(losses).mean()


def make_pairs(
    names: Sequence[tuple[str, str]],
    student: nn.Module,
    mine: Sequence[Tensor],
    theirs: Sequence[Tensor],
    *,
    project: bool,
    seed: int,
) -> Pairs:
    """Return the pairs, checked on one batch of features, with seeded projections where widths differ."""
    pairs = Pairs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for (name, other), own, their in zip(names, mine, theirs, strict=True):
            first = _is_channels_first(student.get_submodule(name))
            pair = Pair(name, other, first and own.ndim > 2, own.ndim > 2)
            sizes = (own.shape[1:-1], their.shape[1:-1])
            if own.ndim != their.ndim or (not pair.channels_first and sizes[0] != sizes[1]):
                raise RecipeRefused(
                    f"layers {name!r} of the student and {other!r} of the teacher do not correspond: their outputs "
                    f"have shapes {list(own.shape)} and {list(their.shape)}",
                    code="layers_do_not_fit",
                    fix="Name layers in recipe.steps[].pairs whose outputs differ in width or image size only.",
                )
            axis = 1 if pair.channels_first else -1
            if project and own.shape[axis] != their.shape[axis]:
                # The same start on every device: drawn on the CPU.
                pair.projection = nn.Linear(own.shape[axis], their.shape[axis]).to(own.device)
            pairs.pairs.append(pair)
    return pairs


def relative_error(output: Tensor, wanted: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the mean squared difference over the mean square of what is wanted.

    `kept` (bool, without the last axis) says which vectors count; None: all.
    """
    if kept is None:
        return functional.mse_loss(output, wanted) / wanted.square().mean().clamp(min=_TINY)
    return _mean((output - wanted).square().mean(-1), kept) / _mean(wanted.square().mean(-1), kept).clamp(min=_TINY)


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """Return the mean of the kept values, 0 where there are none; without asking the device how many there are."""
    mean: Tensor = values.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)
    return mean


def _is_channels_first(layer: nn.Module) -> bool:
    leaves = [each for each in layer.modules() if not isinstance(each, nn.Sequential)]
    return bool(leaves) and isinstance(leaves[-1], CHANNELS_FIRST)


def _fit_maps(pair: Pair, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with channels last, averaged down to the smaller size where maps have two."""
    if not pair.channels_first:
        return own, other
    size = tuple(min(sizes) for sizes in zip(own.shape[2:], other.shape[2:], strict=True))
    return _shrink(own, size).movedim(1, -1), _shrink(other, size).movedim(1, -1)


def _shrink(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    if len(size) == 1:
        return functional.adaptive_avg_pool1d(maps, size[0])
    if len(size) == 2:
        return functional.adaptive_avg_pool2d(maps, (size[0], size[1]))
    return functional.adaptive_avg_pool3d(maps, (size[0], size[1], size[2]))


def _energy(maps: Tensor) -> Tensor:
    """Return (batch, positions), each row of length one, of maps with channels last."""
    return functional.normalize(maps.square().mean(-1).flatten(1), dim=1)


def _relation_loss(own: Tensor, other: Tensor, padding: Tensor | None) -> Tensor:
    real = _real_positions(padding, own)
    # An example of nothing but padding has no relations; without the second term its softmax would be NaN.
    hidden = ~real[:, None, :] & real.any(1)[:, None, None]
    wanted, got = (
        ((each @ each.transpose(1, 2)) / each.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")).log_softmax(-1)
        for each in (other, own)
    )
    return _mean((wanted.exp() * (wanted - got).masked_fill(hidden, 0.0)).sum(-1), real)


def _real_positions(padding: Tensor | None, features: Tensor) -> Tensor:
    """Return where features (batch, ..., width) are not of padding: bool, without the last axis."""
    shape = features.shape[:-1]
    if padding is None or padding.shape != shape:
        return torch.ones(shape, dtype=torch.bool, device=features.device)
    return padding
