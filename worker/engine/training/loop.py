"""The one training loop. Every technique that trains calls `train`; what differs is the loss.

A run is a function of (program, examples, settings, seed): all its state is the `_Run` object, which is therefore the
place where checkpoints will be taken (between two steps) and where a parallel plan will wrap the module.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor, nn

from app.recipes.metrics import Quality
from app.recipes.training import TrainingSettings
from worker.engine.devices import mixed_precision, move_batch
from worker.engine.errors import StepFailed
from worker.engine.programs.placement import move_module, runs_on_device
from worker.engine.programs.program import Program
from worker.engine.training.augment import augment
from worker.engine.training.examples import Batch, BoundExamples
from worker.engine.training.losses import count_targets
from worker.engine.training.optimizers import make_optimizer
from worker.engine.training.prefetch import prefetch
from worker.engine.training.quality import Module, evaluate_module, is_better
from worker.engine.training.schedules import learning_rate

__all__ = ["Constraint", "Loss", "Trained", "learning_rate", "train"]

REPORT_INTERVAL_SECONDS = 0.5
Loss = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None], Tensor]
"""(model outputs, model inputs, labels) -> mean loss of the batch. Outputs are float32 whatever the precision."""


class Constraint(Protocol):
    """Something that holds for the weights after every step of a training run, e.g. that pruned ones are zero."""

    def limit_gradients(self) -> None:
        """Change the gradients after the backward pass, before they are clipped and before the optimizer sees them."""

    def restore(self) -> None:
        """Make it hold again after the optimizer's step. Called without gradients."""


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
    stopped_early: bool = False
    """Whether `patience` ended the run."""


@dataclass
class _Run:
    module: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    constraints: Sequence[Constraint]
    num_steps: int
    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_quality: Quality | None = None
    best_state: dict[str, Tensor] = field(default_factory=dict)


@runs_on_device
def train(
    program: Program,
    examples: BoundExamples,
    settings: TrainingSettings,
    *,
    seed: int,
    report: Callable[..., None],
    loss: Loss | None = None,
    module: nn.Module | None = None,
    extra_parameters: Iterable[nn.Parameter] = (),
    constraints: Sequence[Constraint] = (),
    reference: Module | None = None,
) -> Trained:
    """Train the program's module in place and leave it in eval mode. Without `loss`, the task's own is used.

    `module` is trained instead where it wraps the program's, e.g. to simulate rounding. `extra_parameters` are trained
    along, e.g. a projection that only the loss uses. Masks hold in any case, `constraints` besides.
    With `keep_best`, a tenth of the training rows is set apart to choose by; the held-out rows are never looked at.
    Where there are no labels, quality is likeness to `reference`, a model that does not change meanwhile.
    """
    assert examples.has_labels or reference is not None, "without labels and reference, no epoch is better than another"
    if settings.keep_best:
        examples = examples.set_apart()
    compute_loss = loss or (
        lambda outputs, _, labels: examples.loss(outputs, _labels(labels), label_smoothing=settings.label_smoothing)
    )
    module = module or program.module
    move_module(module, program.device)
    steps_per_epoch = examples.num_training_batches(settings.batch_size, drop_last=_drops_last(examples, settings))
    if steps_per_epoch == 0:
        raise StepFailed(
            f"{examples.num_training} training examples do not fill one batch of {examples.fixed_batch}",
            code="too_few_examples",
            fix="Upload more rows, or export the model with a dynamic batch.",
        )
    num_steps = min(settings.epochs * steps_per_epoch, settings.max_steps or settings.epochs * steps_per_epoch)
    optimizer = make_optimizer(module, settings, extra_parameters)
    run = _Run(
        module=module,
        optimizer=optimizer,
        parameters=[parameter for group in optimizer.param_groups for parameter in group["params"]],
        constraints=(*constraints, _Masks(program)),
        num_steps=num_steps,
    )
    before = _measure(run, examples, settings, reference)
    _keep(run, before)
    first_loss = last_loss = float("nan")
    quality, reported_at, stopped_early = before, 0.0, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while run.step < num_steps and not stopped_early:
            module.train()
            with prefetch(_make_batches(examples, settings, seed, run.epoch)) as batches:
                for each in batches:
                    batch = move_batch(each, program.device)
                    rate = learning_rate(settings, run.step, num_steps)
                    last_loss = _step(run, rate, settings, compute_loss, _split(batch, examples, settings))
                    first_loss = last_loss if run.step == 1 else first_loss
                    if time.monotonic() - reported_at >= REPORT_INTERVAL_SECONDS:
                        reported_at = time.monotonic()
                        _report(report, run, last_loss, rate, quality)
                    if run.step == num_steps:
                        break
            run.epoch += 1
            quality = _measure(run, examples, settings, reference)
            assert run.best_quality is not None
            if not settings.keep_best or is_better(quality, run.best_quality):
                _keep(run, quality)
            stopped_early = settings.patience is not None and run.epoch - run.best_epoch >= settings.patience
            _report(report, run, last_loss, rate, quality, ended=stopped_early)
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
        stopped_early=stopped_early and run.step < num_steps,
    )


def _make_batches(examples: BoundExamples, settings: TrainingSettings, seed: int, epoch: int) -> Iterator[Batch]:
    batches = examples.training_batches(
        settings.batch_size, seed=seed + epoch, drop_last=_drops_last(examples, settings)
    )
    for index, (inputs, labels) in enumerate(batches):
        yield augment(inputs, labels, settings.augmentations, (seed, epoch, index))


def _split(batch: Batch, examples: BoundExamples, settings: TrainingSettings) -> list[tuple[Batch, float]]:
    """Return the parts of a batch with their shares of its mean loss. A model with a fixed batch takes it whole."""
    inputs, labels = batch
    if settings.accumulate == 1 or examples.fixed_batch is not None:
        return [(batch, 1.0)]
    columns = [each.chunk(settings.accumulate) for each in inputs]
    answers = [None] * len(columns[0]) if labels is None else labels.chunk(settings.accumulate)
    parts = list(zip(zip(*columns, strict=True), answers, strict=True))
    counts = [len(part[0]) if answer is None else count_targets(examples.task, answer) for part, answer in parts]
    total = sum(counts)
    if total == 0:
        return [(batch, 1.0)]
    return [(part, count / total) for part, count in zip(parts, counts, strict=True) if count]


def _step(
    run: _Run,
    rate: float,
    settings: TrainingSettings,
    compute_loss: Loss,
    parts: Sequence[tuple[Batch, float]],
) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    value = 0.0
    for (inputs, labels), share in parts:
        with mixed_precision(run.parameters[0].device, bf16=settings.precision == "bf16"):
            outputs = run.module(*inputs)
        outputs = tuple(each.float() if each.dtype == torch.bfloat16 else each for each in outputs)
        loss = compute_loss(outputs, inputs, labels) * share
        value += float(loss.detach())
        if not isfinite(value):
            raise StepFailed(
                f"the loss became {value} at step {run.step} of {run.num_steps} with learning rate {rate:.3g}",
                code="training_diverged",
                fix="Lower learning_rate, raise warmup_fraction, or set gradient_clip_norm.",
            )
        loss.backward()
    for constraint in run.constraints:
        constraint.limit_gradients()
    if settings.gradient_clip_norm is not None:
        nn.utils.clip_grad_norm_(run.parameters, settings.gradient_clip_norm)
    run.optimizer.step()
    with torch.no_grad():
        for constraint in run.constraints:
            constraint.restore()
    return value


class _Masks:
    """Pruned weights stay zero, and no moment of the optimizer remembers them."""

    def __init__(self, program: Program) -> None:
        parameters = dict(program.module.named_parameters(remove_duplicate=False))
        self._masks = [(parameters[name], mask) for name, mask in program.masks.items()]

    def limit_gradients(self) -> None:
        for parameter, mask in self._masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def restore(self) -> None:
        for parameter, mask in self._masks:
            parameter.mul_(mask)


def _drops_last(examples: BoundExamples, settings: TrainingSettings) -> bool:
    """Leave out an incomplete last batch, which batch norm dislikes, unless it is all there is."""
    return examples.num_training >= settings.batch_size


def _measure(run: _Run, examples: BoundExamples, settings: TrainingSettings, reference: Module | None) -> Quality:
    run.module.eval()
    return evaluate_module(run.module, examples, min(settings.batch_size, 256), reference)


def _keep(run: _Run, quality: Quality) -> None:
    run.best_epoch, run.best_quality = run.epoch, quality
    run.best_state = {name: tensor.detach().clone() for name, tensor in run.module.state_dict().items()}


def _report(
    report: Callable[..., None], run: _Run, loss: float, rate: float, quality: Quality, *, ended: bool = False
) -> None:
    report(
        1.0 if ended else run.step / run.num_steps,
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
