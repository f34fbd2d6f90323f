"""What distillation adds to training on labels: for a small student from scratch, and for repairing a pruned model.

    python benchmarks/distillation.py student --data DIR
    python benchmarks/distillation.py repair --data DIR

DIR holds cifar10_train.npz, cifar10_test.npz (x: uint8 NHWC, y), resnet20_cifar10.pt2. The teacher is that ResNet-20,
fine-tuned on the training images first; it is written to --work once. Both ways of training start from the same
weights, see the same images in the same order and take the same steps; 3 seeds. Prints Markdown tables.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.data import Data
from app.recipes.distillation import Distill
from app.recipes.pruning import PruneStructured
from app.recipes.training import Finetune, Train
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import distill, finetune, prune_structured, train
from worker.engine.techniques.base import Context
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.fresh import reset_weights
from worker.engine.training.quality import evaluate_module

TRAINING, TEST = "dst_" + "a" * 26, "dst_" + "b" * 26
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEEDS = (0, 1, 2)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out)
        self.conv2, self.bn2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class ResNet8(nn.Module):
    """Three blocks at half the usual width: 8, 16, 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["student", "repair"])
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--work", type=Path, help="where the fine-tuned teacher is kept")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--ratio", type=float, default=0.5, help="repair: share of the channels removed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set PARE_BENCH_DATA")
    torch.set_num_threads(options.threads)
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    teacher = make_teacher(options.data, work)
    examples = bind(options.data, work, teacher, options.images)
    print(f"teacher: ResNet-20, top-1 {accuracy(teacher, examples):.2%} on {examples.num_evaluation} test images")
    print(
        f"{options.part}: {examples.num_training} training images, {options.epochs} epochs, {options.threads} threads\n"
    )
    print("| seed | start | labels alone | seconds | distilled | seconds | difference |\n|---|---|---|---|---|---|---|")
    {"student": compare_students, "repair": compare_repairs}[options.part](options, work, teacher, examples)


def compare_students(options: argparse.Namespace, work: Path, teacher: Program, examples: BoundExamples) -> None:
    """Train the small student from the same random weights with labels alone and with the teacher."""
    student = import_module(ResNet8(), work)
    common = describe_training(options)

    def start(seed: int) -> Program:
        program = student.copy()
        reset_weights(program, seed)
        return program

    def by_labels(program: Program, seed: int) -> None:
        train.run(program, Train.model_validate({"kind": "train", **common}), context(examples, teacher, seed))

    compare(options, teacher, examples, start, by_labels)


def compare_repairs(options: argparse.Namespace, work: Path, teacher: Program, examples: BoundExamples) -> None:
    """Remove channels of the teacher, then repair with labels alone and with the teacher."""
    del work
    step = PruneStructured.model_validate({"kind": "prune_structured", "ratio": options.ratio})
    pruned = prune_structured.run(teacher.copy(), step, context(examples, teacher, 0)).program
    assert isinstance(pruned, Program)

    def by_labels(program: Program, seed: int) -> None:
        step = Finetune.model_validate({"kind": "finetune", **describe_training(options)})
        finetune.run(program, step, context(examples, teacher, seed))

    compare(options, teacher, examples, lambda _seed: pruned.copy(), by_labels)


def compare(
    options: argparse.Namespace,
    teacher: Program,
    examples: BoundExamples,
    start: Callable[[int], Program],
    by_labels: Callable[[Program, int], None],
) -> None:
    """Print a row per seed and the mean difference with its standard error."""
    step = Distill.model_validate({"kind": "distill", "temperature": options.temperature, **describe_training(options)})
    gains, starts, labelled, taught = [], [], [], []
    for seed in SEEDS:
        first, second = start(seed), start(seed)
        starts.append(accuracy(first, examples))
        began = time.perf_counter()
        by_labels(first, seed)
        between = time.perf_counter()
        distill.run(second, step, context(examples, teacher, seed))
        ended = time.perf_counter()
        labelled.append(accuracy(first, examples))
        taught.append(accuracy(second, examples))
        gains.append(100 * (taught[-1] - labelled[-1]))
        print(
            f"| {seed} | {starts[-1]:.2%} | {labelled[-1]:.2%} | {between - began:.0f} | {taught[-1]:.2%} "
            f"| {ended - between:.0f} | {gains[-1]:+.2f} points |",
            flush=True,
        )
    error = stdev(gains) / len(gains) ** 0.5
    print(
        f"| mean | {mean(starts):.2%} | {mean(labelled):.2%} | | {mean(taught):.2%} | "
        f"| {mean(gains):+.2f} +- {error:.2f} points |"
    )


def describe_training(options: argparse.Namespace) -> dict[str, object]:
    """Return the settings that both ways share. The last weights count: no rows are set apart."""
    return {"epochs": options.epochs, "learning_rate": options.learning_rate, "batch_size": 64, "keep_best": False}


def make_teacher(data: Path, work: Path) -> Program:
    """Return the ResNet-20, fine-tuned for one epoch; from `work` where it is there already."""
    path = work / "teacher.pt2"
    scratch = Path(tempfile.mkdtemp(dir=work))
    if not path.exists():
        program = open_program(data / "resnet20_cifar10.pt2", scratch)
        examples = bind(data, scratch, program, 8000)
        step = Finetune.model_validate({"kind": "finetune", "epochs": 1, "learning_rate": 1e-3, "keep_best": False})
        finetune.run(program, step, context(examples, program, 0))
        export_pt2(program, path)
    return open_program(path, scratch)


def import_module(module: nn.Module, work: Path) -> Program:
    """Return a live module as the service would see it."""
    scratch = Path(tempfile.mkdtemp(dir=work))
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module.eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes)
    torch.export.save(exported, scratch / "model.pt2")
    return open_program(scratch / "model.pt2", scratch)


def bind(data: Path, work: Path, program: Program, num_images: int) -> BoundExamples:
    """Return the first images of the training file, and the whole test file to measure on."""
    scratch = Path(tempfile.mkdtemp(dir=work))
    with np.load(data / "cifar10_train.npz") as table:
        np.savez(scratch / "train.npz", x=table["x"][:num_images], y=table["y"][:num_images])
    binding = {"column": "x", "layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": list(MEAN), "std": list(STD)}
    recipe_data = Data.model_validate(
        {
            "dataset_id": TRAINING,
            "evaluation_dataset_id": TEST,
            "inputs": {program.signature.inputs[0].name: binding},
            "label_column": "y",
            "task": "classification",
        }
    )
    files = {TRAINING: (scratch / "train.npz", "npz"), TEST: (data / "cifar10_test.npz", "npz")}
    return open_examples(recipe_data, files, program.signature, 0, scratch)  # type: ignore[arg-type]


def context(examples: BoundExamples, teacher: Program, seed: int) -> Context:
    """Return what a step gets besides the program; the original is the teacher."""
    return Context(seed, torch.get_num_threads(), Path(), examples, lambda *_, **__: None, open_original=teacher.copy)


def accuracy(program: Program, examples: BoundExamples) -> float:
    """Return top-1 on the test images."""
    return evaluate_module(program.module.eval(), examples, 250).value


if __name__ == "__main__":
    main()
