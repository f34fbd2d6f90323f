"""Which layers can be factorized, and putting the factors into a program in place of a layer."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from worker.engine.low_rank.factors import CONVOLUTIONS, Kind
from worker.engine.programs.program import Program

NAMES = {2: ("first", "second"), 3: ("first", "middle", "last")}


@dataclass
class Candidates:
    """Layers that can be factorized, and those left whole."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Layer -> why it stays whole."""


def find_candidates(program: Program, convolutions: Literal["tucker2", "spatial", "none"] = "tucker2") -> Candidates:
    """Return the layers whose weight is theirs alone and has a decomposition of this kind."""
    found = Candidates()
    holders: dict[int, int] = {}
    for layer in program.module.modules():
        for parameter in layer.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    read = {str(node.target) for node in program.module.graph.nodes if node.op == "get_attr"}
    for name, layer in program.module.named_modules():
        kind = _kind(layer, convolutions)
        if kind is None:
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if holders[id(weight)] > 1 or f"{name}.weight" in read:
            found.left[name] = "another part of the model uses its weight too"
        elif f"{name}.weight" in program.masks:
            found.left[name] = "it is pruned, and its factors would be dense"
        elif kind not in ("matrix", "spatial", "tucker2"):
            found.left[name] = kind
        elif _smallest(weight, kind) >= weight.numel():
            found.left[name] = "even rank 1 would not have fewer weights"
        else:
            found.kinds[name] = kind  # type: ignore[assignment]
    return found


def _kind(layer: nn.Module, convolutions: str) -> str | None:
    """Return the kind of decomposition or why there is none; None for a layer without a weight to speak of."""
    if isinstance(layer, nn.Linear):
        return "matrix"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "transposed convolutions are not factorized"
    if isinstance(layer, nn.RNNBase):
        return None
    if not isinstance(layer, CONVOLUTIONS):
        return None
    if layer.groups > 1:
        return "its channels are in groups (a depthwise convolution is thin already)"
    if convolutions == "none":
        return "convolutions are to stay whole"
    if all(size == 1 for size in layer.kernel_size):
        return "matrix"
    if convolutions == "spatial":
        if isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1:
            return "spatial"
        return "its kernel has not two axes to separate"
    return "tucker2"


def _smallest(weight: Tensor, kind: str) -> int:
    outputs, inputs, *kernel = weight.shape
    if kind == "spatial":
        return inputs * kernel[0] + kernel[1] * outputs
    return outputs + inputs + (weight[0, 0].numel() if kind == "tucker2" else 0)


def make_layers(layer: nn.Module, kind: Kind, weights: list[Tensor]) -> list[nn.Module]:
    """Return the factors as layers, in the order of the data; the last one has the layer's bias itself."""
    made: list[nn.Module] = []
    for index, weight in enumerate(weights):
        last = index == len(weights) - 1
        bias = last and layer.bias is not None
        new: nn.Module
        if isinstance(layer, nn.Linear):
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
        else:
            assert isinstance(layer, CONVOLUTIONS)
            new = type(layer)(
                weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias, device="meta",  # type: ignore[arg-type]
                **_geometry(layer, kind, index),
            )  # fmt: skip
        old = layer.weight
        assert isinstance(old, nn.Parameter)
        new.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        if bias:
            new.bias = layer.bias
        new.train(layer.training)
        made.append(new)
    return made


def _geometry(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, kind: Kind, index: int) -> dict[str, Any]:
    """Return the part of the layer's stride, padding and dilation that factor `index` takes over."""
    whole = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if kind == "spatial":
        neutral = {"stride": 1, "padding": 0, "dilation": 1}
        return {
            name: value
            if isinstance(value, str)
            else tuple(each if axis == index else neutral[name] for axis, each in enumerate(value))
            for name, value in whole.items()
        }
    # A 1x1 convolution may skip positions first; a Tucker core does so in the middle.
    return whole if index == (0 if kind == "matrix" else 1) else {}


def put_layers(program: Program, name: str, layers: list[nn.Module]) -> None:
    """Put a chain of layers in the place of a layer, at `<name>.first` and so on, in every call of it."""
    module = program.module
    names = [f"{name}.{part}" for part in NAMES[len(layers)]]
    holder = nn.Module()
    holder.train(layers[0].training)
    for path, layer in zip(names, layers, strict=True):
        holder.add_module(path.rpartition(".")[2], layer)
    parent, _, own = name.rpartition(".")
    module.get_submodule(parent).add_module(own, holder)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and node.target == f"{name}.bias":
            node.target = f"{names[-1]}.bias"
        if node.op != "call_module" or node.target != name:
            continue
        with module.graph.inserting_before(node):
            value: Any = node.args[0]
            for path in names:
                value = module.graph.call_module(path, (value,))
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)
    module.recompile()
    old, new = f"{name}.bias", f"{names[-1]}.bias"
    program.tied = tuple(tuple(new if each == old else each for each in group) for group in program.tied)
    if old in program.masks:
        program.masks[new] = program.masks.pop(old)
