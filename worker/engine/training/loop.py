"""The one training loop. Every technique that trains calls `train`; what differs is the loss.

A run is a function of (program, examples, settings, seed): all its state is the `_Run` object, which is therefore the
place where checkpoints will be taken (between two steps) and where a parallel plan will wrap the module.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import cos, isfinite, pi
from typing import Protocol

import torch
from torch import Tensor, nn

from app.recipes.metrics import Quality
from worker.engine.errors import StepFailed
from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples
from worker.engine.training.quality import evaluate_module, is_better

REPORT_INTERVAL_SECONDS = 0.5
SGD_MOMENTUM = 0.9
Loss = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None], Tensor]
"""(model outputs, model inputs, labels) -> mean loss of the batch."""


class Settings(Protocol):
    """What a step's spec says about training; Finetune has exactly these fields."""

    @property
    def epochs(self) -> int: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def gradient_clip_norm(self) -> float | None: ...
    @property
    def keep_best(self) -> bool: ...


@dataclass(frozen=True)
class Trained:
    """What a run did. Epoch 0 is the start."""

    epochs_run: int
    steps_run: int
    best_epoch: int
    quality_before: Quality
    """On the rows set apart for choosing (`keep_best`), else on the held-out ones."""
    quality_after: Quality
    """Of the weights that were kept, on the same rows."""
    num_training: int
    """Rows trained on."""
    first_loss: float
    last_loss: float


@dataclass
class _Run:
    module: nn.Module
    optimizer: torch.optim.Optimizer
    masks: dict[nn.Parameter, Tensor]
    num_steps: int
    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_quality: Quality | None = None
    best_state: dict[str, Tensor] = field(default_factory=dict)


def train(
    program: Program,
    examples: BoundExamples,
    settings: Settings,
    *,
    seed: int,
    report: Callable[..., None],
    loss: Loss | None = None,
) -> Trained:
    """Train the program's module in place and leave it in eval mode. Without `loss`, the task's own is used.

    With `keep_best`, a tenth of the training rows is set apart to choose by; the held-out rows are never looked at.
    """
    if settings.keep_best:
        examples = examples.set_apart()
    compute_loss = loss or (lambda outputs, _, labels: examples.loss(outputs, _labels(labels)))
    module = program.module
    steps_per_epoch = examples.num_training_batches(settings.batch_size, drop_last=_drops_last(examples, settings))
    if steps_per_epoch == 0:
        raise StepFailed(
            f"{examples.num_training} training examples do not fill one batch of {examples.fixed_batch}",
            code="too_few_examples",
            fix="Upload more rows, or export the model with a dynamic batch.",
        )
    num_steps = min(settings.epochs * steps_per_epoch, settings.max_steps or settings.epochs * steps_per_epoch)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    run = _Run(
        module=module,
        optimizer=_make_optimizer(module, settings),
        masks={parameters[name]: mask for name, mask in program.masks.items()},
        num_steps=num_steps,
    )
    before = _measure(run, examples, settings)
    _keep(run, before)
    first_loss = last_loss = float("nan")
    quality, reported_at = before, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while run.step < num_steps:
            module.train()
            batches = examples.training_batches(
                settings.batch_size, seed=seed + run.epoch, drop_last=_drops_last(examples, settings)
            )
            for inputs, labels in batches:
                rate = learning_rate(settings, run.step, num_steps)
                last_loss = _step(run, rate, settings, partial(_call_loss, compute_loss, inputs, labels), inputs)
                first_loss = last_loss if run.step == 1 else first_loss
                if time.monotonic() - reported_at >= REPORT_INTERVAL_SECONDS:
                    reported_at = time.monotonic()
                    _report(report, run, last_loss, rate, quality)
                if run.step == num_steps:
                    break
            run.epoch += 1
            quality = _measure(run, examples, settings)
            _report(report, run, last_loss, rate, quality)
            if run.best_quality is None or not settings.keep_best or is_better(quality, run.best_quality):
                _keep(run, quality)
    if settings.keep_best and run.best_epoch != run.epoch:
        module.load_state_dict(run.best_state)
    module.eval()
    assert run.best_quality is not None
    return Trained(
        epochs_run=run.epoch,
        steps_run=run.step,
        best_epoch=run.best_epoch,
        quality_before=before,
        quality_after=run.best_quality,
        num_training=examples.num_training,
        first_loss=first_loss,
        last_loss=last_loss,
    )


def learning_rate(settings: Settings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then constant or a cosine to zero."""
    num_warmup = round(settings.warmup_fraction * num_steps)
    if step < num_warmup:
        return settings.learning_rate * (step + 1) / (num_warmup + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + cos(pi * (step - num_warmup) / max(num_steps - num_warmup, 1)))


def _call_loss(loss: Loss, inputs: tuple[Tensor, ...], labels: Tensor | None, outputs: tuple[Tensor, ...]) -> Tensor:
    return loss(outputs, inputs, labels)


def _step(
    run: _Run,
    rate: float,
    settings: Settings,
    loss_of: Callable[[tuple[Tensor, ...]], Tensor],
    inputs: tuple[Tensor, ...],
) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(run.module(*inputs))
    value = float(loss.detach())
    run.step += 1
    if not isfinite(value):
        raise StepFailed(
            f"the loss became {value} at step {run.step} of {run.num_steps} with learning rate {rate:.3g}",
            code="training_diverged",
            fix="Lower learning_rate, raise warmup_fraction, or set gradient_clip_norm.",
        )
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for parameter, mask in run.masks.items():
        if parameter.grad is not None:
            # Before clipping and before the optimizer sees it, so that no moment remembers a pruned weight.
            parameter.grad.mul_(mask)
    if settings.gradient_clip_norm is not None:
        nn.utils.clip_grad_norm_(run.module.parameters(), settings.gradient_clip_norm)
    run.optimizer.step()
    with torch.no_grad():
        for parameter, mask in run.masks.items():
            parameter.mul_(mask)
    return value


def _make_optimizer(module: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise StepFailed("the model has no trainable parameters", code="nothing_to_train")
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    undecayed = {p for layer in module.modules() if isinstance(layer, norms) for p in layer.parameters()}
    groups = [
        {
            "params": [p for p in trainable if p.ndim >= 2 and p not in undecayed],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in trainable if p.ndim < 2 or p in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=SGD_MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _drops_last(examples: BoundExamples, settings: Settings) -> bool:
    """Leave out an incomplete last batch, which batch norm dislikes, unless it is all there is."""
    return examples.num_training >= settings.batch_size


def _measure(run: _Run, examples: BoundExamples, settings: Settings) -> Quality:
    run.module.eval()
    return evaluate_module(run.module, examples, min(settings.batch_size, 256))


def _keep(run: _Run, quality: Quality) -> None:
    run.best_epoch, run.best_quality = run.epoch, quality
    run.best_state = {name: tensor.detach().clone() for name, tensor in run.module.state_dict().items()}


def _report(report: Callable[..., None], run: _Run, loss: float, rate: float, quality: Quality) -> None:
    report(
        run.step / run.num_steps,
        f"step {run.step} of {run.num_steps}, loss {loss:.4g}, {quality.metric} {quality.value:.4g}",
        loss=loss,
        learning_rate=rate,
        step=run.step,
        epoch=run.epoch,
        **{quality.metric: quality.value},
    )


def _labels(labels: Tensor | None) -> Tensor:
    assert labels is not None, "the recipe's validation asks for labels"
    return labels
