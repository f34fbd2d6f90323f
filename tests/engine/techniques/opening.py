"""Opening a zoo model or a module of a test's own as the engine does, and binding columns to its inputs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.recipes.data import Data
from tests.engine.zoo import export_model
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples, open_examples

ID = "dst_" + "a" * 26


def load(name: str, directory: Path, **options: Any) -> Program:
    export_model(name, directory / f"{name}.pt2", **options)
    (directory / "work").mkdir(exist_ok=True)
    return open_program(directory / f"{name}.pt2", directory / "work")


def open_module(module: nn.Module, inputs: tuple[Tensor, ...], directory: Path) -> Program:
    dynamic: Any = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    torch.export.save(
        torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic),
        directory / "model.pt2",
    )
    (directory / "work").mkdir()
    return open_program(directory / "model.pt2", directory / "work")


def bind(program: Program, columns: dict[str, np.ndarray], directory: Path, **spec: Any) -> BoundExamples:
    np.savez(directory / "data.npz", **columns)  # type: ignore[arg-type]
    names = [tensor.name for tensor in program.signature.inputs]
    inputs = {name: {"column": column} for name, column in zip(names, columns, strict=False)}
    data = Data.model_validate({"dataset_id": ID, "inputs": inputs, **spec})
    return open_examples(data, {ID: (directory / "data.npz", "npz")}, program.signature, 0, directory)
