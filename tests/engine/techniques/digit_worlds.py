"""A trained model for digits, imported as the engine does it, together with its bound examples."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from app.recipes.data import Data
from tests.engine.digits import DATASET_ID, make_uploads
from tests.engine.folders import make_folder
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples, open_examples

World = tuple[Program, BoundExamples]
DATA = {
    "dataset_id": DATASET_ID, "inputs": {"image": {"column": "image", "scale": 1 / 16}}, "label_column": "label",
    "task": "classification",
}  # fmt: skip


def open_world(make: Callable[[], nn.Module]) -> World:
    """Return a program that the test may change, and the examples."""
    program, examples = _train(make)
    return program.copy(), examples


@cache
def _train(make: Callable[[], nn.Module]) -> World:
    directory = make_folder()
    uploads = make_uploads(make(), directory, epochs=1)
    program = open_program(uploads.model, directory)
    files: Any = {DATASET_ID: (uploads.data, "npz")}
    return program, open_examples(Data.model_validate(DATA), files, program.signature, 0, directory)
