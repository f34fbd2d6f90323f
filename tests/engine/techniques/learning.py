"""Small programs of the zoo with data for the tests of techniques that train: labelled digits, or any inputs."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from app.recipes.data import Data
from app.recipes.facts import TensorFacts
from tests.engine.folders import make_folder
from tests.engine.zoo import export_model
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context
from worker.engine.training.examples import BoundExamples, open_examples

ID = "dst_" + "a" * 26


class SmallCnn(nn.Module):
    """Convolutions with batch norms of any width and depth for 8x8 digits; optionally a stride, hence smaller maps."""

    def __init__(self, width: int, depth: int = 2, stride: int = 1) -> None:
        super().__init__()
        sizes = [1, *(width * (place + 1) for place in range(depth))]
        self.convs = nn.ModuleList(
            nn.Conv2d(sizes[place], sizes[place + 1], 3, stride if place else 1, padding=1) for place in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.fc = nn.Linear(sizes[-1], 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def make_cnn(width: int, depth: int = 2, stride: int = 1, seed: int = 0) -> Program:
    """Return an imported SmallCnn with seeded weights."""
    program = _import_cnn(width, depth, stride).copy()
    torch.manual_seed(seed)
    program.module.load_state_dict(SmallCnn(width, depth, stride).state_dict())
    return program


@cache
def _import_cnn(width: int, depth: int, stride: int) -> Program:
    directory = make_folder()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(
        SmallCnn(width, depth, stride).eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes
    )
    torch.export.save(exported, directory / "model.pt2")
    return open_program(directory / "model.pt2", directory)


def make_zoo(name: str) -> Program:
    """Return an imported model of the zoo."""
    return _import_zoo(name).copy()


@cache
def _import_zoo(name: str) -> Program:
    directory = make_folder()
    export_model(name, directory / f"{name}.pt2")
    return open_program(directory / f"{name}.pt2", directory)


def digit_examples(program: Program, directory: Path, *, labels: bool = True) -> BoundExamples:
    """Return the handwritten digits, bound to a program with one image input."""
    table = load_digits()
    images = table.images.astype(np.uint8)[:, None]
    (tensor,) = program.signature.inputs
    labelled: dict[str, Any] = {"task": "classification", "label_column": "label"} if labels else {"task": "none"}
    return bind(program, directory, {"image": images, "label": table.target}, {tensor.name: 1 / 16}, **labelled)


def random_examples(program: Program, directory: Path, num_rows: int = 96, **data: Any) -> BoundExamples:
    """Return random inputs that fit a program's example inputs."""
    arrays = {
        tensor.name: values.numpy()
        for tensor, values in zip(program.signature.inputs, program.example_inputs(num_rows), strict=True)
    }
    return bind(program, directory, arrays, dict.fromkeys(arrays, 1.0), by_name=True, **data)


def bind(
    program: Program,
    directory: Path,
    arrays: dict[str, np.ndarray],
    scales: dict[str, float],
    *,
    by_name: bool = False,
    **data: Any,
) -> BoundExamples:
    """Write arrays to a file and bind them."""
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "data.npz", **arrays)  # type: ignore[arg-type]
    inputs = {
        name: {"column": name if by_name else "image", **({} if scale == 1.0 else {"scale": scale})}
        for name, scale in scales.items()
    }
    bound = Data.model_validate({"dataset_id": ID, "inputs": inputs, **data})
    return open_examples(bound, {ID: (directory / "data.npz", "npz")}, program.signature, 0, directory)


def open_pruned_cnn(directory: Path) -> tuple[Program, BoundExamples]:
    """Return a narrow SmallCnn, half of a weight pruned, with the digits."""
    program = make_cnn(4)
    program.masks["convs.1.weight"] = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    program.apply_masks()
    return program, digit_examples(program, directory)


def open_gpt(directory: Path, num_rows: int = 96) -> tuple[Program, BoundExamples]:
    """Return the zoo's language model with random tokens."""
    program = make_zoo("gpt")
    return program, random_examples(program, directory, num_rows, task="language_modeling")


def context(examples: BoundExamples, teacher: Program | None = None, seed: int = 0) -> Context:
    """Return a context whose original, and every other teacher, is `teacher`."""
    return Context(
        seed, 1, Path(), examples, lambda *_, **__: None,
        open_original=None if teacher is None else teacher.copy,
        open_teacher=None if teacher is None else lambda _: teacher.copy(),
    )  # fmt: skip


def state_bytes(program: Program) -> dict[str, bytes]:
    """Return the bits of every parameter and buffer."""
    return {name: tensor.numpy().tobytes() for name, tensor in program.module.state_dict().items()}


def facts(name: str, dtype: str, *shape: int | str) -> TensorFacts:
    """Return the facts of an input or output."""
    return TensorFacts(name=name, dtype=dtype, shape=shape)
