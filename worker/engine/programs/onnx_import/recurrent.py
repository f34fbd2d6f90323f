"""LSTM, GRU and RNN as torch's layers: the order of the gates and the layout of the results differ."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.programs.onnx_import.call import Call
from worker.engine.programs.onnx_import.layers import trained
from worker.engine.programs.onnx_import.tensors import Array

_ORDERS = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Gate of torch -> its place in ONNX."""
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def recurrent(call: Call) -> Any:
    """Return the outputs of LSTM, GRU or RNN: (length, directions, batch, size), then the last states."""
    op = call.node.op
    tensor = call.tensor(0)
    directions = {"forward": 1, "bidirectional": 2}.get(call.attribute("direction", "forward"), 0)
    given = tuple(call.attribute("activations", ())) or _DEFAULTS[op] * max(1, directions)
    relu = op == "RNN" and given == ("Relu",) * directions
    if not directions or not (relu or given == _DEFAULTS[op] * directions):
        return call.refuse("it runs backwards only, or with other activations than the usual ones")
    if call.attribute("layout", 0) or call.attribute("clip") is not None or call.attribute("input_forget", 0):
        return call.refuse("layout, clip and input_forget are not taken")
    if op == "GRU" and not call.attribute("linear_before_reset", 0):
        return call.refuse("linear_before_reset is 0, which torch's GRU cannot compute; export with 1 (reset_after)")
    if call.has(4) or call.has(7):
        return call.refuse("sequence lengths and peepholes are not taken")
    if any(trained(call, index) is None for index in (1, 2)) or (call.has(3) and call.known(3) is None):
        return call.refuse("its weights are no constants of the file")
    arrays = call.owner.constants.arrays
    weights = {index: arrays[call.node.inputs[index]] for index in (1, 2, 3) if call.has(index)}
    gates = len(_ORDERS[op])
    size, features = weights[2].shape[2], weights[1].shape[2]
    wanted = {1: (directions, gates * size, features), 2: (directions, gates * size, size),
              3: (directions, 2 * gates * size)}  # fmt: skip
    if any(array.shape != wanted[index] for index, array in weights.items()) or tensor.dim() != 3:
        return call.refuse("its weights do not fit together")

    def make() -> nn.Module:
        kind: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[op]
        options = {"nonlinearity": "relu"} if relu else {}
        module: nn.Module = kind(features, size, bias=3 in weights, bidirectional=directions == 2, **options)
        with torch.no_grad():
            for name, array in _torch_weights(weights, _ORDERS[op], size).items():
                getattr(module, name).copy_(torch.from_numpy(array))
        return module

    hints = {f"{index}": call.node.inputs[index] for index in weights}
    layer = call.owner.layer(call, op.lower(), (directions, given), make, hints)
    states = _states(call, op)
    output, last = layer(tensor, states) if states is not None else layer(tensor)
    length, batch = tensor.shape[0], tensor.shape[1]
    output = output.reshape(length, batch, directions, size).permute(0, 2, 1, 3)
    return (output, *(last if isinstance(last, tuple) else (last,)))


def _torch_weights(weights: dict[int, Array], order: tuple[int, ...], size: int) -> dict[str, Array]:
    def reorder(array: Array) -> Array:
        return np.concatenate([array[gate * size : (gate + 1) * size] for gate in order])

    named: dict[str, Array] = {}
    for direction in range(weights[1].shape[0]):
        suffix = "l0" + ("_reverse" if direction else "")
        named[f"weight_ih_{suffix}"] = reorder(weights[1][direction])
        named[f"weight_hh_{suffix}"] = reorder(weights[2][direction])
        if 3 in weights:
            half = weights[3].shape[1] // 2
            named[f"bias_ih_{suffix}"] = reorder(weights[3][direction][:half])
            named[f"bias_hh_{suffix}"] = reorder(weights[3][direction][half:])
    return named


def _states(call: Call, op: str) -> Tensor | tuple[Tensor, ...] | None:
    given = [index for index in ((5, 6) if op == "LSTM" else (5,)) if call.has(index)]
    # torch's layers start from zeros by themselves.
    if all(call.owner.constants.is_zero(call.node.inputs[index], call.owner.makers) for index in given):
        return None
    if op == "LSTM" and len(given) == 1:
        return call.refuse("one of its two first states is missing")  # type: ignore[no-any-return]
    states = tuple(call.tensor(index) for index in given)
    return states if op == "LSTM" else states[0]
