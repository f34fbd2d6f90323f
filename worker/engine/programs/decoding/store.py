"""A program whose encoded weights are stored as codes: layers that decode their weight at every call."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.programs.decoding.weights import CodedWeight, make_coded
from worker.engine.programs.program import Program

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}
_RECURRENT: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


class CodedLayer(nn.Module):
    """A linear layer or a convolution of any kind."""

    def __init__(self, weight: CodedWeight, bias: Tensor | None, compute: Callable[..., Tensor]) -> None:
        """`compute` takes the input, the weight and the bias."""
        super().__init__()
        self.weight, self.bias, self.compute = weight, bias, compute

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer with the decoded weight returns."""
        return self.compute(x, self.weight(), self.bias)


class CodedEmbedding(nn.Module):
    """A table, of which only the rows are decoded that are looked up."""

    def __init__(self, weight: CodedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows."""
        rows: Tensor = self.weight(indices)
        return rows


class CodedRecurrent(nn.Module):
    """An LSTM, GRU or RNN; some of its weights may be coded, the others are parameters as before."""

    def __init__(self, layer: nn.RNNBase, coded: dict[str, CodedWeight]) -> None:
        super().__init__()
        self.mode, self.names = layer.mode, [name for name in layer._flat_weights_names if name]
        self.options = (layer.bias, layer.num_layers, 0.0, False, layer.bidirectional, layer.batch_first)
        self.batch_axis = 0 if layer.batch_first else 1
        num_states = layer.num_layers * (2 if layer.bidirectional else 1)
        self.states = [(num_states, layer.proj_size or layer.hidden_size), (num_states, layer.hidden_size)]
        for name in self.names:
            setattr(self, name, coded.get(name, getattr(layer, name)))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the outputs and the last state: of an LSTM two tensors, else one. Without `state` it begins at 0."""
        if state is None:
            batch = x.shape[self.batch_axis]
            zeros = [x.new_zeros(number, batch, width) for number, width in self.states]
            state = tuple(zeros) if self.mode == "LSTM" else zeros[1]
        weights = [each() if isinstance(each, CodedWeight) else each for each in map(self.__getattr__, self.names)]
        output, *states = _RECURRENT[self.mode](x, state, weights, *self.options)
        return output, tuple(states) if self.mode == "LSTM" else states[0]


def store_codes(program: Program) -> Program:
    """Return a program of the same outputs that stores every encoded weight as codes, those that are shared once.

    Where the graph reads such a weight without a layer, it is decoded as a whole. The program is for export: what its
    layers were is no longer to be seen.
    """
    if not program.encodings:
        return program
    changed = replace(program.copy(), masks={}, encodings={}, tied=())
    parameters = dict(changed.module.named_parameters(remove_duplicate=False))
    coded = {id(parameters[name]): make_coded(each) for name, each in program.encodings.items()}
    for name, layer in list(changed.module.named_modules(remove_duplicate=False)):
        held = {key: coded[id(each)] for key, each in layer._parameters.items() if id(each) in coded}
        if held:
            changed.module.set_submodule(name, _replace(layer, held))
    for node in changed.module.graph.nodes:
        if node.op == "get_attr" and id(parameters.get(str(node.target))) in coded:
            node.op, node.args = "call_module", ()
    changed.module.recompile()
    return changed


def _replace(layer: nn.Module, held: dict[str, CodedWeight]) -> nn.Module:
    if isinstance(layer, nn.RNNBase):
        return CodedRecurrent(layer, held)
    if isinstance(layer, nn.Embedding):
        return CodedEmbedding(held["weight"])
    assert set(held) == {"weight"}
    if isinstance(layer, nn.Linear):
        return CodedLayer(held["weight"], layer.bias, functional.linear)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    options: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    if layer.transposed:
        options["output_padding"] = layer.output_padding
    return CodedLayer(held["weight"], layer.bias, partial(_CONVOLUTIONS[type(layer)], **options))
