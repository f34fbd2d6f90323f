"""What parallel plans gain and cost: steps per second, waiting and memory per rank, each against one process.

    python -m benchmarks.parallel_training [--part paces|memory] [--rounds N] [--short N] [--long N]

Every rank has one thread. A variant's pace comes from the difference of a long and a short run, so that starting
processes and measuring quality cancel out. All variants take turns, round after round, and a gain is the median of the
gains within the rounds; its range is theirs. The weights after the long run must be those of one process.

Memory is that of rank 1, which trains and does nothing else: its resident bytes after a backward pass, without those of
the same rank with a tiny model, which are Python and torch. The model is large then and its batches are small, so what
is left is parameters, gradients, moments and buffers.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.recipes.data import Data
from app.recipes.training import Finetune
from worker.engine.environment import read_processor
from worker.engine.parallel.launch import run_parallel
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import finetune
from worker.engine.techniques.base import Context
from worker.engine.training.examples import BoundExamples, open_examples

DATASET = "dst_" + "a" * 26
NUM_ROWS = 4096
VARIANTS: dict[str, dict[str, Any] | None] = {
    "one process": None,
    "data 2": {"data": 2},
    "data 2, sharded": {"data": 2, "shard": True},
    "tensor 2": {"tensor": 2},
    "pipeline 2 (1F1B)": {"pipeline": 2},
}


class Transformer(nn.Module):
    """An encoder of a few blocks over 32 tokens, with a small classifier: matrix products, hardly anything else."""

    def __init__(self, width: int = 256, num_blocks: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(32, width)
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        size = y.shape[-1] // self.heads
        q, k, v = (f(y).unflatten(-1, (self.heads, size)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return result


def make_world(directory: Path, width: int = 256) -> tuple[Program, BoundExamples]:
    """Return the imported model and random labelled rows."""
    torch.manual_seed(0)
    directory.mkdir()
    model = Transformer(width).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (torch.zeros(2, 32, 32),), dynamic_shapes=shapes), directory / "m.pt2")
    program = open_program(directory / "m.pt2", directory)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(NUM_ROWS, 32, 32)).astype(np.float32)
    np.savez(directory / "data.npz", x=rows, label=rng.integers(0, 10, NUM_ROWS))
    data = Data.model_validate(
        {"dataset_id": DATASET, "inputs": {"x": {"column": "x"}}, "label_column": "label", "task": "classification",
         "max_evaluation_examples": 16}
    )  # fmt: skip
    return program, open_examples(data, {DATASET: (directory / "data.npz", "npz")}, program.signature, 0, directory)


def run(
    program: Program, examples: BoundExamples, plan: dict[str, Any] | None, num_steps: int, batch_size: int
) -> tuple[float, dict[str, Any], Program]:
    """Train a copy; return seconds, facts, and the copy."""
    step = Finetune.model_validate(
        {"kind": "finetune", "max_steps": num_steps, "batch_size": batch_size, "keep_best": False, "parallel": plan}
    )
    copy = program.copy()
    with tempfile.TemporaryDirectory() as place:
        context = Context(0, 1, Path(place), examples, lambda *_, **__: None)
        started_at = time.perf_counter()
        if step.parallel is None:
            outcome = finetune.run(copy, step, context)
        else:
            outcome = run_parallel("finetune", finetune.run, copy, step, step.parallel, context)
        return time.perf_counter() - started_at, outcome.facts, copy


def difference(one: Program, other: Program) -> float:
    """Return the largest difference of two programs' tensors, relative to the tensor's norm."""
    pairs = zip(one.module.state_dict().values(), other.module.state_dict().values(), strict=True)
    return max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in pairs if a.is_floating_point())


def measure_paces(directory: Path, chosen: argparse.Namespace) -> None:
    """Print what each plan gains."""
    paces: dict[str, list[float]] = {name: [] for name in VARIANTS}
    facts: dict[str, dict[str, Any]] = {}
    results: dict[str, Program] = {}
    program, examples = make_world(directory)
    for _ in range(chosen.rounds):
        for name, plan in VARIANTS.items():
            short, _, _ = run(program, examples, plan, chosen.short, chosen.batch_size)
            long, facts[name], results[name] = run(program, examples, plan, chosen.long, chosen.batch_size)
            paces[name].append((chosen.long - chosen.short) / (long - short))
    print("| plan | steps/s | gain | range | waiting | difference of weights |\n|---|---:|---:|---:|---:|---:|")
    for name, own in paces.items():
        gains = [a / b for a, b in zip(own, paces["one process"], strict=True)]
        waiting = facts[name].get("communication_share")
        print(
            f"| {name} | {', '.join(f'{pace:.2f}' for pace in own)} | {statistics.median(gains):.2f}x "
            f"| {min(gains):.2f} to {max(gains):.2f} | {'' if waiting is None else f'{waiting:.0%}'} "
            f"| {difference(results['one process'], results[name]):.1g} |"
        )


def measure_memory(directory: Path, width: int) -> None:
    """Print what rank 1 holds with replicas and with shards."""
    tiny, few = make_world(directory / "tiny", 16)
    large, rows = make_world(directory / "large", width)
    state = 4 * sum(each.nbytes for each in large.module.parameters())
    print(f"\nparameters, gradients and two moments: {state / 2**20:.0f} MiB\n")
    print("| plan | rank 1 | with a tiny model | difference |\n|---|---:|---:|---:|")
    differences = []
    for name in ("data 2", "data 2, sharded"):
        base, peak = (peak_of(*world, VARIANTS[name]) for world in ((tiny, few), (large, rows)))
        differences.append(peak - base)
        print(f"| {name} | {peak:.0f} MiB | {base:.0f} MiB | {peak - base:.0f} MiB |")
    print(f"\nsharded / replicas: {differences[1] / differences[0]:.2f}")


def peak_of(program: Program, examples: BoundExamples, plan: dict[str, Any] | None) -> float:
    """Return the largest resident memory of rank 1 in MiB."""
    _, facts, _ = run(program, examples, plan, 3, 2)
    return int(str(facts["memory_per_rank"]).split(", ")[1]) / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["both", "paces", "memory"], default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=2)
    parser.add_argument("--long", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--memory-width", type=int, default=1024)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(f"`{' '.join(['python -m benchmarks.parallel_training', *sys.argv[1:]])}`")
    print(f"\ntorch {torch.__version__}, {read_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as place:
        if chosen.part != "memory":
            measure_paces(Path(place) / "paces", chosen)
        if chosen.part != "paces":
            measure_memory(Path(place), chosen.memory_width)


if __name__ == "__main__":
    main()
