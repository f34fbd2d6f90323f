"""Operators that were a torch.nn layer in the model's code, turned back into that layer.

Each builder looks at one call and returns the layer without its tensors (on the meta device), the names under which the
layer holds them, and the call's remaining inputs; or None where the call cannot be such a layer.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

aten = torch.ops.aten


@dataclass
class Call:
    """One call of an operator: all its arguments by name, and the tensors that are weights or buffers."""

    arguments: dict[str, Any]
    tensors: dict[fx.Node, Tensor]
    rank: int
    """Axes of the (first) input."""
    channels: int
    """Size of the input's axis 1, or 0 where it varies."""
    turned: Container[fx.Node] = ()
    """Matrices among the tensors that are stored as the transpose of what the call takes."""

    def tensor(self, name: str) -> Tensor | None:
        """Return the weight or buffer given for an argument."""
        node = self.arguments[name]
        return self.tensors.get(node) if isinstance(node, fx.Node) else None

    def held(self, *names: str) -> dict[str, fx.Node] | None:
        """Return the nodes of the tensors among the arguments; None if one of them is computed in the graph."""
        nodes = {name: self.arguments[name] for name in names if self.arguments[name] is not None}
        return nodes if all(node in self.tensors for node in nodes.values()) else None


@dataclass
class Layer:
    """A layer in place of a call."""

    module: nn.Module
    held: dict[str, fx.Node] = field(default_factory=dict)
    """Attribute of the layer -> the graph's node of the tensor it holds."""
    inputs: tuple[Any, ...] = ()
    trains: bool = False
    """Whether the call was recorded in training mode."""


class ScaledDotProductAttention(nn.Module):
    """Attention whose dropout follows the training mode."""

    def __init__(self, dropout_p: float, *, is_causal: bool, scale: float | None, enable_gqa: bool) -> None:
        super().__init__()
        self.dropout_p, self.is_causal, self.scale, self.enable_gqa = dropout_p, is_causal, scale, enable_gqa

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return the attended values."""
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            self.dropout_p if self.training else 0.0,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def extra_repr(self) -> str:
        """Show the parameters."""
        return f"{self.dropout_p}, is_causal={self.is_causal}, scale={self.scale}, enable_gqa={self.enable_gqa}"


def _linear(call: Call) -> Layer | None:
    weight, held = call.tensor("weight"), call.held("weight", "bias")
    if weight is None or held is None or weight.dim() != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in held, device="meta")
    return Layer(module, held, (call.arguments["input"],))


def is_affine(node: fx.Node, weight: fx.Node, stored: Container[fx.Node]) -> bool:
    """Whether a node is bias + input @ weight with a stored bias: nn.Linear but for the layout of its weight."""
    if node.target is not aten.addmm.default:
        return False
    given = arguments_of(node)
    bias = given["self"]
    plain = given["mat2"] is weight and given["mat1"] is not weight and given["beta"] == 1 and given["alpha"] == 1
    return plain and bias in stored and bias.meta["val"].dim() == 1


def _affine(call: Call) -> Layer | None:
    weight, held = call.tensor("mat2"), call.held("self", "mat2")
    if weight is None or held is None or held["mat2"] not in call.turned:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    return Layer(module, {"weight": held["mat2"], "bias": held["self"]}, (call.arguments["mat1"],))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _each(value: Any, rank: int) -> tuple[int, ...] | None:
    values = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(item, int) for item in values):
        return None
    return tuple(values * rank if len(values) == 1 else values)


def _convolution(call: Call) -> Layer | None:
    weight, held = call.tensor("weight"), call.held("weight", "bias")
    if weight is None or held is None:
        return None
    rank = weight.dim() - 2
    padding = call.arguments["padding"]
    shape: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": _each(call.arguments["stride"], rank),
        "padding": padding if isinstance(padding, str) else _each(padding, rank),
        "dilation": _each(call.arguments["dilation"], rank),
    }
    groups = call.arguments["groups"]
    if None in shape.values() or not 1 <= rank <= 3:
        return None
    bias = "bias" in held
    module: nn.Module
    if call.arguments.get("transposed", "output_padding" in call.arguments):
        shape["output_padding"] = _each(call.arguments["output_padding"], rank)
        module = _TRANSPOSED[rank - 1](
            weight.shape[0], weight.shape[1] * groups, groups=groups, bias=bias, device="meta", **shape
        )
    else:
        module = _CONVOLUTIONS[rank - 1](
            weight.shape[1] * groups, weight.shape[0], groups=groups, bias=bias, device="meta", **shape
        )
    return Layer(module, held, (call.arguments["input"],))


def _embedding(call: Call) -> Layer | None:
    weight, held = call.tensor("weight"), call.held("weight")
    if weight is None or held is None:
        return None
    padding = call.arguments["padding_idx"]
    module = nn.Embedding(
        weight.shape[0],
        weight.shape[1],
        padding_idx=padding if isinstance(padding, int) and padding >= 0 else None,
        scale_grad_by_freq=call.arguments["scale_grad_by_freq"],
        sparse=call.arguments["sparse"],
        device="meta",
    )
    return Layer(module, held, (call.arguments["indices"],))


def _layer_norm(call: Call) -> Layer | None:
    held, shape = call.held("weight", "bias"), call.arguments["normalized_shape"]
    if held is None or not all(isinstance(size, int) for size in shape) or set(held) == {"bias"}:
        return None
    module = nn.LayerNorm(
        list(shape), call.arguments["eps"], elementwise_affine=bool(held), bias="bias" in held, device="meta"
    )
    return Layer(module, held, (call.arguments["input"],))


def _rms_norm(call: Call) -> Layer | None:
    held, shape = call.held("weight"), call.arguments["normalized_shape"]
    if held is None or not all(isinstance(size, int) for size in shape):
        return None
    module = nn.RMSNorm(list(shape), call.arguments["eps"], elementwise_affine=bool(held), device="meta")
    return Layer(module, held, (call.arguments["input"],))


def _group_norm(call: Call) -> Layer | None:
    held = call.held("weight", "bias")
    if held is None or len(held) == 1 or not call.channels:
        return None
    module = nn.GroupNorm(
        call.arguments["num_groups"], call.channels, call.arguments["eps"], affine=bool(held), device="meta"
    )
    return Layer(module, held, (call.arguments["input"],))


_BATCH_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
_INSTANCE_NORMS: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _running_norm(kinds: dict[int, type[nn.Module]], flag: str) -> Callable[[Call], Layer | None]:
    def build(call: Call) -> Layer | None:
        held = call.held("weight", "bias", "running_mean", "running_var")
        if held is None or not call.channels or call.rank not in kinds or ("weight" in held) != ("bias" in held):
            return None
        tracks = "running_mean" in held
        if tracks != ("running_var" in held):
            return None
        module = kinds[call.rank](
            call.channels,
            eps=call.arguments["eps"],
            momentum=call.arguments["momentum"],
            affine="weight" in held,
            track_running_stats=tracks,
            device="meta",
        )
        return Layer(module, held, (call.arguments["input"],), trains=tracks and bool(call.arguments[flag]))

    return build


def _prelu(call: Call) -> Layer | None:
    weight, held = call.tensor("weight"), call.held("weight")
    if weight is None or held is None or weight.dim() != 1:
        return None
    return Layer(nn.PReLU(weight.shape[0], device="meta"), held, (call.arguments["self"],))


def _dropout(kind: type[nn.Module], *, inplace: bool = False) -> Callable[[Call], Layer | None]:
    def build(call: Call) -> Layer | None:
        module = kind(p=call.arguments["p"], inplace=inplace)
        return Layer(module, {}, (call.arguments["input"],), trains=bool(call.arguments["train"]))

    return build


def _feature_dropout(call: Call) -> Layer | None:
    kind = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}.get(call.rank)
    return _dropout(kind)(call) if kind else None


def _attention(call: Call) -> Layer | None:
    given = call.arguments
    # Without dropout there is nothing that follows the training mode: the call stays a plain function.
    if given["dropout_p"] == 0.0:
        return None
    module = ScaledDotProductAttention(
        given["dropout_p"], is_causal=given["is_causal"], scale=given["scale"], enable_gqa=given["enable_gqa"]
    )
    return Layer(module, {}, (given["query"], given["key"], given["value"], given["attn_mask"]), trains=True)


def _recurrent(kind: Any, **options: Any) -> Callable[[Call], Layer | None]:
    def build(call: Call) -> Layer | None:
        given = call.arguments
        nodes = list(given["params"])
        if not all(node in call.tensors for node in nodes):
            return None
        first = call.tensors[nodes[0]]
        gates = {nn.LSTM: 4, nn.GRU: 3}.get(kind, 1)
        directions = 2 if given["bidirectional"] else 1
        per_direction = len(nodes) // (given["num_layers"] * directions)
        projected = per_direction == (5 if given["has_biases"] else 3)
        if projected and kind is not nn.LSTM:
            return None
        module = kind(
            first.shape[1],
            first.shape[0] // gates,
            num_layers=given["num_layers"],
            bias=given["has_biases"],
            batch_first=given["batch_first"],
            dropout=given["dropout"],
            bidirectional=given["bidirectional"],
            device="meta",
            **options,
            **({"proj_size": call.tensors[nodes[per_direction - 1]].shape[0]} if projected else {}),
        )
        names = [
            name for layer in module._flat_weights_names for name in ([layer] if isinstance(layer, str) else layer)
        ]
        if len(names) != len(nodes):
            return None
        states = given["hx"]
        state = tuple(states) if isinstance(states, (list, tuple)) else states
        return Layer(module, dict(zip(names, nodes, strict=True)), (given["input"], state), trains=bool(given["train"]))

    return build


BUILDERS: dict[Any, Callable[[Call], Layer | None]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _affine,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _convolution,
    aten.conv_transpose2d.input: _convolution,
    aten.conv_transpose3d.input: _convolution,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _running_norm(_BATCH_NORMS, "training"),
    aten.instance_norm.default: _running_norm(_INSTANCE_NORMS, "use_input_stats"),
    aten.prelu.default: _prelu,
    aten.dropout.default: _dropout(nn.Dropout),
    aten.dropout_.default: _dropout(nn.Dropout, inplace=True),
    aten.alpha_dropout.default: _dropout(nn.AlphaDropout),
    aten.feature_alpha_dropout.default: _dropout(nn.FeatureAlphaDropout),
    aten.feature_dropout.default: _feature_dropout,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent(nn.LSTM),
    aten.gru.input: _recurrent(nn.GRU),
    aten.rnn_tanh.input: _recurrent(nn.RNN, nonlinearity="tanh"),
    aten.rnn_relu.input: _recurrent(nn.RNN, nonlinearity="relu"),
}
"""Operator -> what makes a layer of one of its calls."""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an operator's call by name, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    given: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            given[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            given[argument.name] = node.kwargs[argument.name]
        else:
            given[argument.name] = argument.default_value if argument.has_default_value() else None
    return given
