"""The one training loop. Every technique that trains calls `train`; what differs is the loss.

A run is a function of (program, examples, settings, seed): all its state is the `Run` object, of which checkpoints are
taken between two steps. How a step's work is spread over processes is the strategy's.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from app.recipes.metrics import Quality
from app.recipes.parallel import MAX_RANKS
from app.recipes.training import TrainingSettings
from worker.engine.devices import fast_products, move
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.parallel.choose import choose_strategy
from worker.engine.parallel.strategy import Fact, Loss, Objective, Part, Seen, Strategy
from worker.engine.programs.placement import move_module, runs_on_device
from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples
from worker.engine.training.feeding import drops_last, make_parts
from worker.engine.training.optimizers import make_optimizer
from worker.engine.training.prefetch import prefetch
from worker.engine.training.quality import Module, evaluate_module, is_better
from worker.engine.training.run import Constraint, Run, Stateful, set_random_state
from worker.engine.training.schedules import learning_rate

__all__ = ["Checkpoints", "Constraint", "Loss", "Stateful", "Trained", "learning_rate", "train"]

REPORT_INTERVAL_SECONDS = 0.5
MAX_UNREAD = 1000
"""Steps whose losses wait on the device at most."""


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
    parallel_facts: dict[str, Fact] = field(default_factory=dict)
    """What a parallel plan did and cost; empty without one."""


class Checkpoints(Protocol):
    """Where the runs of one step are written down while they go, and go on after a crash.

    Under a parallel plan every rank calls the same methods in the same order.
    """

    def skip(self) -> Trained | None:
        """Return what this run did, where an earlier attempt finished it: the next one's state includes it."""

    def restore(self, run: Run) -> bool:
        """Put the run where a checkpoint found it; False where it starts from the beginning."""

    def offer(self, run: Run) -> None:
        """Write a checkpoint if one is due. The run is between two steps."""

    def finish(self, trained: Trained) -> None:
        """Note that the run is over."""

    def follow(self) -> "Checkpoints":
        """Return what takes part on another rank of the step's parallel plan: it goes on from the same checkpoint."""


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
    stateful: Sequence[Stateful] = (),
    reference: Module | None = None,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train the program's module in place and leave it in eval mode. Without `loss`, the task's own is used.

    `module` is trained instead where it wraps the program's, e.g. to simulate rounding. `extra_parameters` are trained
    along, e.g. a projection that only the loss uses. Masks hold in any case, `constraints` besides. What else a
    run changes is `stateful`; with `checkpoints`, a run that was interrupted goes on with the same bits.
    With `keep_best`, a tenth of the training rows is set apart to choose by; the held-out rows are never looked at.
    Where there are no labels, quality is likeness to `reference`, a model that does not change meanwhile.
    """
    assert examples.has_labels or reference is not None, "without labels and reference, no epoch is better than another"
    if checkpoints is not None and (done := checkpoints.skip()) is not None:
        return done
    if settings.keep_best:
        examples = examples.set_apart()
    _check_precision(settings, program.device)

    def compute_task_loss(outputs: tuple[Tensor, ...], seen: Seen) -> Tensor:
        return examples.loss(outputs, _labels(seen.labels), label_smoothing=settings.label_smoothing)

    compute_loss = loss or compute_task_loss
    objective = Objective(compute_loss, settings.precision, program.device)
    module = module or program.module
    move_module(module, program.device)
    steps_per_epoch = examples.num_training_batches(settings.batch_size, drop_last=drops_last(examples, settings))
    if steps_per_epoch == 0:
        raise StepFailed(
            f"{examples.num_training} training examples do not fill one batch of {examples.fixed_batch}",
            code="too_few_examples",
            fix="Upload more rows, or export the model with a dynamic batch.",
        )
    num_steps = min(settings.epochs * steps_per_epoch, settings.max_steps or settings.epochs * steps_per_epoch)
    extra = list(extra_parameters)
    strategy = choose_strategy(settings, program, module, examples, extra)
    optimizer = make_optimizer(module, settings, extra)
    run = Run(
        program=program,
        module=module,
        strategy=strategy,
        optimizer=optimizer,
        parameters=[parameter for group in optimizer.param_groups for parameter in group["params"]],
        extra_parameters=extra,
        constraints=(*constraints, _Masks(program, strategy)),
        stateful=stateful,
        num_steps=num_steps,
    )
    if checkpoints is None or not checkpoints.restore(run):
        run.before = _measure(run, examples, settings, reference)
        _keep(run, settings, run.before)
    if settings.compile:
        report(run.step / num_steps, "compiling the model")
    reads_at_once = objective.device.type == "cpu"  # where no one waits for a device
    reported_at = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + strategy.seed_offset + MAX_RANKS * run.step)
        if run.random is not None:
            set_random_state(run.random)
        while run.step < num_steps and not run.stopped_early:
            module.train()
            with prefetch(make_parts(run, examples, settings, seed)) as batches:
                for parts in batches:
                    rate = learning_rate(settings, run.step, num_steps)
                    _step(run, rate, settings, objective, parts)
                    if reads_at_once or len(run.unread) == MAX_UNREAD:
                        run.read_losses()
                    # The other ranks have nobody to tell, and read their losses where all do.
                    if strategy.rank == 0 and time.monotonic() - reported_at >= REPORT_INTERVAL_SECONDS:
                        _report(report, run, rate)
                        reported_at = time.monotonic()
                    if run.step == num_steps:
                        break
                    if checkpoints is not None:
                        checkpoints.offer(run)
            run.epoch, run.batch = run.epoch + 1, 0
            run.read_losses()
            run.quality = _measure(run, examples, settings, reference)
            assert run.best_quality is not None
            if not settings.keep_best or is_better(run.quality, run.best_quality):
                _keep(run, settings, run.quality)
            run.stopped_early = settings.patience is not None and run.epoch - run.best_epoch >= settings.patience
            _report(report, run, learning_rate(settings, run.step - 1, num_steps), ended=run.stopped_early)
            if checkpoints is not None:
                checkpoints.offer(run)
    if settings.keep_best and run.best_epoch != run.epoch:
        module.load_state_dict(run.best_state)
    module.eval()
    facts = strategy.finish()
    assert run.before is not None
    assert run.best_quality is not None
    trained = Trained(
        epochs_run=run.epoch,
        steps_run=run.step,
        best_epoch=run.best_epoch,
        quality_before=run.before,
        quality_after=run.best_quality,
        num_training=examples.num_training,
        first_loss=run.first_loss,
        last_loss=run.last_loss,
        stopped_early=run.stopped_early and run.step < num_steps,
        parallel_facts=facts,
    )
    if checkpoints is not None:
        checkpoints.finish(trained)
    return trained


def _check_precision(settings: TrainingSettings, device: torch.device) -> None:
    """Refuse TF32 where the device has none, rather than train in another precision than the recipe says."""
    if settings.precision == "tf32" and device.type != "cuda":
        raise RecipeRefused(
            "precision is 'tf32', which is arithmetic of GPUs, and this step trains on the CPU",
            code="tf32_needs_gpu",
            fix="Set precision to 'fp32' or 'bf16', or needs.device to 'gpu', so that a GPU worker takes the job.",
        )


def _step(run: Run, rate: float, settings: TrainingSettings, objective: Objective, parts: Sequence[Part]) -> None:
    """Take one step. It only tells the device what to do: whatever reads a number back from there makes the host wait,
    and the device afterwards."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    run.step, run.batch = run.step + 1, run.batch + 1
    with fast_products(objective.device, tf32=settings.precision == "tf32"):
        run.unread.append((run.strategy.backward(parts, objective), rate))
    for constraint in run.constraints:
        constraint.limit_gradients()
    if settings.gradient_clip_norm is not None:
        run.strategy.clip(run.parameters, settings.gradient_clip_norm)
    run.optimizer.step()
    with torch.no_grad():
        for constraint in run.constraints:
            constraint.restore()


class _Masks:
    """Pruned weights stay zero, and no moment of the optimizer remembers them."""

    def __init__(self, program: Program, strategy: Strategy) -> None:
        self._program, self._strategy = program, strategy
        self._parameters = dict(program.module.named_parameters(remove_duplicate=False))
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def limit_gradients(self) -> None:
        for parameter, mask in self._list():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def restore(self) -> None:
        for parameter, mask in self._list():
            parameter.mul_(mask)

    def _list(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield what this rank trains with its part of the mask. A restored run brings masks of its own."""
        for name, mask in self._program.masks.items():
            held = self._strategy.held(self._parameters[name])
            if held is None:
                continue
            if name not in self._parts or self._parts[name][0] is not mask:
                self._parts[name] = mask, self._strategy.part(self._parameters[name], mask)
            yield held, self._parts[name][1]


def _measure(run: Run, examples: BoundExamples, settings: TrainingSettings, reference: Module | None) -> Quality:
    run.module.eval()

    def predict(*inputs: Tensor) -> tuple[Tensor, ...]:
        return run.strategy.predict(*move(inputs, run.program.device))

    quality = evaluate_module(predict, examples, min(settings.batch_size, 256), reference)
    return cast(Quality, run.strategy.gather(quality)[0])  # one measurement, so that all ranks decide alike


def _keep(run: Run, settings: TrainingSettings, quality: Quality) -> None:
    run.best_epoch, run.best_quality = run.epoch, quality
    if settings.keep_best:
        run.best_state = {name: tensor.detach().clone() for name, tensor in run.module.state_dict().items()}


def _report(report: Callable[..., None], run: Run, rate: float, *, ended: bool = False) -> None:
    run.read_losses()
    quality = run.quality or run.before
    assert quality is not None
    report(
        1.0 if ended else run.step / run.num_steps,
        f"step {run.step} of {run.num_steps}, loss {run.last_loss:.4g}, {quality.metric} {quality.value:.4g}",
        loss=run.last_loss,
        learning_rate=rate,
        step=run.step,
        epoch=run.epoch,
        **{quality.metric: quality.value},
    )


def _labels(labels: Tensor | None) -> Tensor:
    assert labels is not None, "the recipe's validation asks for labels"
    return labels
