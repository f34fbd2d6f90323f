"""The optimizers of the training loop, and which parameters decay."""

from collections.abc import Iterable

import torch
from torch import nn

from app.recipes.training import TrainingSettings
from worker.engine.errors import StepFailed

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def make_optimizer(
    module: nn.Module, settings: TrainingSettings, extra: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer of all trainable parameters, each once; biases and those of norms never decay.

    Weight decay is decoupled in AdamW (Loshchilov and Hutter 2019); the others add it to the gradient.
    """
    trainable = dict.fromkeys([*(each for each in module.parameters() if each.requires_grad), *extra])
    if not trainable:
        raise StepFailed("the model has no trainable parameters", code="nothing_to_train")
    undecayed = {p for layer in module.modules() if isinstance(layer, NORMS) for p in layer.parameters()}
    groups = [
        {
            "params": [p for p in trainable if p.ndim >= 2 and p not in undecayed],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in trainable if p.ndim < 2 or p in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, momentum = settings.learning_rate, settings.momentum
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=momentum)
        case "adam":
            return torch.optim.Adam(groups, lr=rate)
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate)
