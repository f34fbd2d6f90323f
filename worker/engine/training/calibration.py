"""Unlabelled training examples for techniques that look at activations."""

from collections.abc import Iterator

from torch import Tensor

from worker.engine.training.examples import BoundExamples

BATCH_SIZE = 32


def calibration_batches(
    examples: BoundExamples, num_examples: int, seed: int, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[Tensor, ...]]:
    """Yield model inputs of `num_examples` training rows chosen by the seed, or of all where there are fewer.

    A model with a fixed batch gets whole batches, so that the last may go beyond `num_examples`.
    """
    left = num_examples
    for inputs, _ in examples.training_batches(min(batch_size, num_examples), seed=seed):
        if left <= 0:
            return
        if examples.fixed_batch is None and len(inputs[0]) > left:
            inputs = tuple(each[:left] for each in inputs)
        left -= len(inputs[0])
        yield inputs
