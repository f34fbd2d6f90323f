"""What a run is fed with: the batches of an epoch, each as the parts that this process computes."""

from collections.abc import Iterator

from app.recipes.training import TrainingSettings
from worker.engine.devices import pin_batch
from worker.engine.parallel.strategy import Part
from worker.engine.training.augment import augment
from worker.engine.training.examples import Batch, BoundExamples
from worker.engine.training.parts import split_batch
from worker.engine.training.run import Run


def make_parts(run: Run, examples: BoundExamples, settings: TrainingSettings, seed: int) -> Iterator[list[Part]]:
    """Yield this rank's parts of every batch that is left of the run's epoch; seed and epoch decide which those are.

    All of this is work of the host, done by another thread than the one that keeps the device busy: reading,
    augmenting, checking and counting labels, cutting, copying into memory that the device can read by itself.
    """
    epoch, start, device = run.epoch, run.batch, run.program.device
    batches = examples.training_batches(
        settings.batch_size, seed=seed + epoch, drop_last=drops_last(examples, settings), start=start
    )
    for index, (inputs, labels) in enumerate(batches, start):
        if labels is not None:
            examples.check_labels(labels)
        batch = augment(inputs, labels, settings.augmentations, (seed, epoch, index))
        yield [(pin_batch(part, device), share) for part, share in _split(run, batch, examples, settings)]


def _split(run: Run, batch: Batch, examples: BoundExamples, settings: TrainingSettings) -> list[Part]:
    """Return this rank's parts of a batch. A model with a fixed batch takes it whole."""
    if examples.fixed_batch is not None:
        return [(batch, 1.0)]
    strategy = run.strategy
    num_parts = settings.accumulate * (settings.parallel.microbatches if settings.parallel else 1)
    return split_batch(batch, examples.task, num_parts, strategy.num_shares, strategy.share)


def drops_last(examples: BoundExamples, settings: TrainingSettings) -> bool:
    """Leave out an incomplete last batch, which batch norm dislikes, unless it is all there is."""
    return examples.num_training >= examples.limit_batch(settings.batch_size)
