"""What every kind of layer does to the positions of its input, and which of its parameters' axes they are."""

from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from worker.engine.programs.layers import ScaledDotProductAttention
from worker.engine.pruning.flow import Axes, Flow, Reading
from worker.engine.pruning.labels import Ids
from worker.engine.pruning.product_rules import pass_attention

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RUNNING_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
DROPOUTS = (nn.modules.dropout._DropoutNd, nn.Identity)


def pass_layer(flow: Flow, node: fx.Node, name: str, layer: nn.Module) -> Any:
    """Return the labels of what the layer makes."""
    source = node.args[0] if node.args else None
    axes = flow.axes(source)
    result: Any = None
    if axes is not None and isinstance(source, fx.Node):
        if isinstance(layer, nn.Linear):
            ids = flow.bind(layer.weight, 1, axes[-1], "in", f"{name} reads an input of the model")
            result = [*axes[:-1], _outputs(flow, layer)]
        elif isinstance(layer, CONVOLUTIONS):
            result = _convolution(flow, name, layer, axes)
        elif isinstance(layer, RUNNING_NORMS) and len(axes) >= 2:
            ids = axes[1]
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                ids = flow.bind(tensor, 0, ids, "scale") if tensor is not None else ids
            result = [axes[0], ids, *axes[2:]]
        elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) == 1:
            ids = axes[-1]
            for tensor in (layer.weight, getattr(layer, "bias", None)):
                ids = flow.bind(tensor, 0, ids, "scale") if tensor is not None else ids
            if ids is not None:
                flow.labels.tag(ids, "norm")
                flow.readings.append(Reading(node, 0, len(axes) - 1, ids))
            result = [*axes[:-1], ids]
        elif isinstance(layer, nn.GroupNorm):
            result = _group_norm(flow, layer, axes)
        elif isinstance(layer, nn.Embedding):
            flow.freeze(axes, f"its channels are numbers of rows of {name}")
            ids = flow.bind(layer.weight, 1, flow.tensor(layer.weight)[1][1], "out")
            if ids is not None:
                flow.labels.tag(ids, "embedding")
            result = [*[None] * len(axes), ids]
        elif isinstance(layer, nn.PReLU):
            ids = axes[1] if len(axes) > 1 else None
            ids = flow.bind(layer.weight, 0, ids, "scale") if layer.num_parameters > 1 else ids
            result = [axes[0], ids, *axes[2:]] if len(axes) > 1 else list(axes)
        elif isinstance(layer, DROPOUTS):
            result = list(axes)
        elif isinstance(layer, ScaledDotProductAttention):
            result = pass_attention(flow, node, list(node.args))
        elif isinstance(layer, nn.RNNBase) and not getattr(layer, "proj_size", 0):
            result = _recurrent(flow, node, layer, axes)
    if result is not None:
        return result
    for each in node.all_input_nodes:
        flow.freeze(flow.values.get(each), f"its channels reach {name} ({type(layer).__name__}), which keeps its width")
    for tensor in (*layer.parameters(), *layer.buffers()):
        flow.freeze(flow.tensor(tensor)[1], f"{name} ({type(layer).__name__}) keeps its width")
    shape = flow.shapes[node]
    return [None] * len(shape) if isinstance(shape, tuple) else _blank(shape)


def _blank(shape: Any) -> Any:
    if isinstance(shape, tuple):
        return [None] * len(shape)
    return [_blank(part) for part in shape] if isinstance(shape, list) else None


def _outputs(flow: Flow, layer: Any) -> Ids | None:
    ids: Ids | None = flow.tensor(layer.weight)[1][0]
    ids = flow.bind(layer.weight, 0, ids, "out") if ids is not None else None
    if layer.bias is not None and ids is not None:
        flow.bind(layer.bias, 0, ids, "out")
    return ids


def _convolution(flow: Flow, name: str, layer: Any, axes: Axes) -> Axes | None:
    if len(axes) != layer.weight.dim():
        return None
    ids, groups = axes[1], layer.groups
    why = f"{name} reads an input of the model"
    blank: Axes = [None] * (len(axes) - 2)
    if groups == 1:
        reads, makes = (0, 1) if layer.transposed else (1, 0)
        flow.bind(layer.weight, reads, ids, "in", why)
        made = flow.tensor(layer.weight)[1][makes]
        if made is not None:
            made = flow.bind(layer.weight, makes, made, "out")
            if layer.bias is not None:
                flow.bind(layer.bias, 0, made, "out")
        return [axes[0], made, *blank]
    if ids is None:
        return None
    if groups == layer.in_channels:
        # Depthwise: the filters of an input channel go with it.
        each = layer.out_channels // groups
        made = np.repeat(ids, each)
        if layer.transposed:
            flow.bind(layer.weight, 0, ids, "scale")
            if each > 1:
                flow.freeze(flow.tensor(layer.weight)[1][1], "filters of one channel stay together")
        else:
            flow.bind(layer.weight, 0, made, "scale")
        if layer.bias is not None:
            flow.bind(layer.bias, 0, made, "scale")
        return [axes[0], made, *blank]
    if layer.transposed:
        return None
    # Every group of the convolution loses the channel at the same place, so that the groups stay equal.
    rows = ids.reshape(groups, -1)
    for row in rows[1:]:
        flow.labels.unite(rows[0], row)
    flow.bind(layer.weight, 1, rows[0], "in")
    made = flow.tensor(layer.weight)[1][0]
    assert made is not None
    flow.bind(layer.weight, 0, made, "out")
    if layer.bias is not None:
        flow.bind(layer.bias, 0, made, "out")
    for row in made.reshape(groups, -1)[1:]:
        flow.labels.unite(made.reshape(groups, -1)[0], row)
    return [axes[0], made, *blank]


def _group_norm(flow: Flow, layer: nn.GroupNorm, axes: Axes) -> Axes | None:
    ids = axes[1]
    for tensor in (layer.weight, layer.bias):
        ids = flow.bind(tensor, 0, ids, "scale") if tensor is not None else ids
    if ids is not None:
        # Whole groups go, so that the statistics of the others stay.
        columns = ids.reshape(layer.num_groups, -1).T
        for column in columns[1:]:
            flow.labels.unite(columns[0], column)
    return [axes[0], ids, *axes[2:]]


def _recurrent(flow: Flow, node: fx.Node, layer: nn.RNNBase, axes: Axes) -> list[Any]:
    """All layers and directions lose the same hidden units: torch gives them one size."""
    hidden = flow.labels.new(layer.hidden_size)
    recurrent: Tensor = layer.get_parameter("weight_hh_l0")
    gates = len(recurrent) // layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    entering = axes[-1]
    for depth in range(layer.num_layers):
        for suffix in ("", "_reverse")[:directions]:
            for which in ("ih", "hh"):
                weight: Tensor = getattr(layer, f"weight_{which}_l{depth}{suffix}")
                flow.bind(weight, 0, np.tile(hidden, gates), "out")
                read = hidden if which == "hh" else entering
                flow.bind(weight, 1, read, "in", "it reads an input of the model")
                if layer.bias:
                    flow.bind(getattr(layer, f"bias_{which}_l{depth}{suffix}"), 0, np.tile(hidden, gates), "out")
        entering = np.tile(hidden, directions)
    for source in node.all_input_nodes[1:]:
        states = flow.axes(source)
        if states is None or states[-1] is None:
            flow.labels.freeze(hidden, "its first state has a fixed width")
        else:
            flow.labels.unite(hidden, states[-1])
    rank = len(axes)
    state: Axes = [*[None] * (rank - 1), hidden]
    whole: Axes = [*axes[:-1], entering]
    return [whole, [list(state), list(state)]] if isinstance(layer, nn.LSTM) else [whole, list(state)]
