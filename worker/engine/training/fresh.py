"""New random weights for a program, as if its architecture had just been built."""

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn

from worker.engine.programs.program import Program

FREE_STD = 0.02
"""Standard deviation of free parameters such as position embeddings (Vaswani-type models; Dosovitskiy et al. 2021)."""
GAINS, SHIFTS = ("weight", "gamma", "gain", "scale"), ("bias", "beta")


@dataclass
class Fresh:
    """Parameters by how they got their new values."""

    by_layer: list[str] = field(default_factory=list)
    """By the initialization of the torch.nn layer that owns them."""
    guessed: list[str] = field(default_factory=list)
    """Free parameters that no layer owns, by shape and name."""
    kept: list[str] = field(default_factory=list)
    """As they were: not trainable, or nothing tells what they start from."""


def reset_weights(program: Program, seed: int) -> Fresh:
    """Give every trainable parameter the value that its architecture would start from; masks hold afterwards.

    Layers of torch.nn initialize themselves, running statistics included. A free parameter called a gain becomes one,
    a shift zero; a matrix named `weight` gets the uniform bounds of torch's linear layers, any other shape with two
    sizes above one a normal distribution. The same seed gives the same bits, whatever the weights were.
    """
    fresh, done = Fresh(), set[int]()
    names = {id(parameter): name for name, parameter in program.module.named_parameters()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # Embeddings first: where one shares its table with the output layer, that layer's smaller numbers win.
        for layer in sorted(program.module.modules(), key=lambda each: not isinstance(each, nn.Embedding)):
            own = [each for each in layer.parameters(recurse=False) if each.requires_grad]
            reset = getattr(layer, "reset_parameters", None)
            if own and callable(reset):
                reset()
                done.update(map(id, own))
        for layer in program.module.modules():
            if isinstance(layer, nn.Embedding) and layer.padding_idx is not None and id(layer.weight) in done:
                layer.weight[layer.padding_idx].zero_()
        for name, parameter in program.module.named_parameters():
            if id(parameter) in done:
                fresh.by_layer.append(names[id(parameter)])
            elif parameter.requires_grad and _guess(name.rpartition(".")[2], parameter):
                fresh.guessed.append(name)
            else:
                fresh.kept.append(name)
    program.apply_masks()
    return fresh


def _guess(name: str, parameter: Tensor) -> bool:
    if sum(size > 1 for size in parameter.shape) >= 2:
        if name.endswith("weight"):
            bound = 1 / sqrt(parameter.numel() / parameter.shape[0])
            parameter.uniform_(-bound, bound)
        else:
            parameter.normal_(0, FREE_STD)
    elif name.endswith(GAINS):
        parameter.fill_(1.0)
    elif name.endswith(SHIFTS):
        parameter.zero_()
    elif parameter.ndim >= 2:
        parameter.normal_(0, FREE_STD)
    else:
        return False
    return True
