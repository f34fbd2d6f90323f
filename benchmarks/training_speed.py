"""What each way of training faster gains on this machine: steps per second against the plain loop, in one process.

    python -m benchmarks.training_speed [--rounds N] [--short N] [--long N] [--threads N]

A variant's pace comes from the difference of a long and a short run, so that opening data, measuring quality and
loading compiled kernels cancel out. All variants take turns, round after round; a gain is the median of those within
the rounds. `compile` is compiled once before; what that takes is printed apart.

`no prefetch` is the plain loop with something taken out: each batch is made when it is needed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.data import Data
from app.recipes.training import Finetune
from benchmarks.parallel_training import DATASET, Transformer, difference
from worker.engine.environment import read_processor
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import finetune
from worker.engine.techniques.base import Context
from worker.engine.training import loop
from worker.engine.training.examples import BoundExamples, open_examples

NUM_ROWS = 4096
World = tuple[Program, BoundExamples]


class Convolutions(nn.Module):
    """A small residual CNN for images of 32 x 32, whose batches take a while to read and augment."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)) for _ in range(4)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = functional.relu(x + block(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@contextmanager
def make_when_needed(source: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Do without the thread."""
    yield iter(source)


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "plain": ({}, nullcontext),
    "no prefetch": ({}, lambda: patch.object(loop, "prefetch", make_when_needed)),
    "bf16": ({"precision": "bf16"}, nullcontext),
    "compile": ({"compile": True}, nullcontext),
    "compile, bf16": ({"compile": True, "precision": "bf16"}, nullcontext),
}


def make_world(module: nn.Module, shape: tuple[int, ...], directory: Path) -> World:
    """Return the imported model and random labelled rows."""
    directory.mkdir()
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module.eval(), (torch.zeros(2, *shape),), dynamic_shapes=dynamic)
    torch.export.save(exported, directory / "m.pt2")
    program = open_program(directory / "m.pt2", directory)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (NUM_ROWS, *shape), dtype=np.uint8)
    np.savez_compressed(directory / "data.npz", x=rows, label=rng.integers(0, 10, NUM_ROWS))
    data = Data.model_validate(
        {"dataset_id": DATASET, "inputs": {"x": {"column": "x", "scale": 1 / 128, "mean": [1.0]}},
         "label_column": "label", "task": "classification", "max_evaluation_examples": 16}
    )  # fmt: skip
    return program, open_examples(data, {DATASET: (directory / "data.npz", "npz")}, program.signature, 0, directory)


def run(world: World, spec: dict[str, Any], num_steps: int, batch_size: int) -> tuple[float, Program]:
    """Train a copy; return seconds and the copy."""
    program, examples = world
    step = Finetune.model_validate(
        {
            "kind": "finetune",
            "epochs": 100,
            "max_steps": num_steps,
            "batch_size": batch_size,
            "keep_best": False,
            **spec,
        }
    )
    copy = program.copy()
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as place:
        started_at = time.perf_counter()
        finetune.run(copy, step, Context(0, 1, Path(place), examples, lambda *_, **__: None))
        return time.perf_counter() - started_at, copy


def measure(world: World, common: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Print what each variant gains on one model."""
    first = {
        name: run(world, {**common, **spec}, chosen.short, chosen.batch_size)[0]
        for name, (spec, _) in VARIANTS.items()
        if "compile" in spec
    }
    paces: dict[str, list[float]] = {name: [] for name in VARIANTS}
    results: dict[str, Program] = {}
    again: dict[str, float] = {}
    for _ in range(chosen.rounds):
        for name, (spec, change) in VARIANTS.items():
            with change():
                again[name], _ = run(world, {**common, **spec}, chosen.short, chosen.batch_size)
                long, results[name] = run(world, {**common, **spec}, chosen.long, chosen.batch_size)
            paces[name].append((chosen.long - chosen.short) / (long - again[name]))
    print("| variant | steps/s | gain | compiled in | difference of weights |\n|---|---:|---:|---:|---:|")
    for name, own in paces.items():
        gain = statistics.median(a / b for a, b in zip(own, paces["plain"], strict=True))
        compiled = f"{first[name] - again[name]:.0f} s" if name in first else ""
        apart = difference(results["plain"], results[name])
        print(f"| {name} | {', '.join(f'{pace:.1f}' for pace in own)} | {gain:.2f}x | {compiled} | {apart:.1g} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=3)
    parser.add_argument("--long", type=int, default=18)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True)
    print(f"`{' '.join(['python -m benchmarks.training_speed', *sys.argv[1:]])}`")
    print(f"\ntorch {torch.__version__}, {read_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
        print("\nResidual CNN, flip and crop\n")
        world = make_world(Convolutions(), (3, 32, 32), Path(place) / "cnn")
        measure(world, {"augmentations": ["flip", "crop"]}, chosen)
        print("\nTransformer\n")
        measure(make_world(Transformer(128), (32, 32), Path(place) / "transformer"), {}, chosen)


if __name__ == "__main__":
    main()
