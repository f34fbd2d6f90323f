"""The inputs that both models get while they are measured: held-out examples, or random ones without data."""

from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from app.recipes.recipe import Target
from worker.engine.measure.runtimes import Arrays, open_model, runtime_of
from worker.engine.programs.program import FileProgram, Program, Signature
from worker.engine.training.examples import BoundExamples

NUM_COMPARED = 256
"""Examples on which outputs are compared, at most."""
NUM_RANDOM_BATCHES = 8
NUM_SAMPLES = 4
"""Examples in the sample input of the artifacts, where the batch may vary."""

Array = NDArray[np.generic]


def choose_batch(signature: Signature, target: Target) -> tuple[int, tuple[str, ...]]:
    """Return the batch size of the measurement, and what must be said about it."""
    wanted = target.batch_size
    if signature.batch_size is not None:
        size = signature.batch_size
        reason = f"the model was exported with a fixed batch of {size}"
        return size, (f"Trained and measured at batch {size}: {reason}.",)
    lowest, highest = signature.dynamic_ranges.get("batch", (1, None))
    size = max(lowest, wanted if highest is None else min(wanted, highest))
    if size == wanted:
        return size, ()
    bounds = f"{lowest} to {'any' if highest is None else highest}"
    return size, (f"Measured at batch {size} and not {wanted}: the model was exported for batches of {bounds}.",)


def choose_inputs(program: Program, examples: BoundExamples | None, batch_size: int, seed: int) -> list[Arrays]:
    """Return batches of exactly `batch_size`; the first is the one that is timed."""
    if examples is None:
        random = (program.example_inputs(batch_size, seed + index) for index in range(NUM_RANDOM_BATCHES))
        return [tuple(each.numpy() for each in inputs) for inputs in random]
    num_batches = max(1, NUM_COMPARED // batch_size)
    batches = (inputs for inputs, _ in islice(examples.evaluation_batches(batch_size), num_batches))
    arrays = [tuple(each.numpy() for each in inputs) for inputs in batches]
    full = [each for each in arrays if len(each[0]) == batch_size]
    return full or [tuple(np.resize(each, (batch_size, *each.shape[1:])) for each in arrays[0])]


def make_sample(program: Program | FileProgram, inputs: Arrays) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return named sample inputs and the outputs for them: from the module in memory rather than from an export of it.

    A program that exists as a file only is run from that file.
    """
    signature = program.signature
    rows = len(inputs[0]) if signature.batch_size is not None else NUM_SAMPLES
    sample = tuple(each[:rows] for each in inputs)
    if isinstance(program, FileProgram):
        outputs = open_model(program.path, runtime_of(program.path), signature, 1)(sample)
    else:
        program.module.eval()
        with torch.inference_mode():
            outputs = tuple(each.numpy() for each in program.module(*(torch.from_numpy(each) for each in sample)))
    return (
        {facts.name: array for facts, array in zip(signature.inputs, sample, strict=True)},
        {facts.name: array for facts, array in zip(signature.outputs, outputs, strict=True)},
    )
