"""ResNet-20 with 2.1 times fewer MACs: Pare's prune_structured against a plain Torch-Pruning script.

    python benchmarks/structured_pruning.py accuracy --data DIR [--seed 0] [--epochs 4] [--method NAME ...] [--teacher]
    python benchmarks/structured_pruning.py latency --data DIR [--runs 60] [--method NAME ...]

DIR (or PARE_BENCH_DATA) holds resnet20_cifar10.pt2, cifar10_train.npz and cifar10_test.npz. Both methods prune the
same imported module, are fine-tuned by the same loop with the same settings and seed, and judged on the same images.
With --teacher Pare's are fine-tuned by `distill` instead, in as many steps, with the unpruned model as the teacher.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp

from app.recipes.data import Data
from app.recipes.distillation import Distill
from app.recipes.pruning import PruneStructured
from app.recipes.training import TrainingSettings
from worker.engine.environment import seed_everything
from worker.engine.errors import StepFailed
from worker.engine.measure.latency import estimate_ratio, summarize, time_interleaved
from worker.engine.measure.macs import count_macs
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import distill
from worker.engine.techniques.base import Context
from worker.engine.techniques.prune_structured import run
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.loop import train
from worker.engine.training.quality import evaluate_module

FEWER_MACS = 2.1
"""What the script is asked for, and Pare unless its method says more."""
BATCH = 64
TRAIN, TEST = "dst_" + "a" * 26, "dst_" + "b" * 26
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ignore(*_: object, **__: object) -> None:
    """Report to nobody."""


def prune_with_pare(
    program: Program, examples: BoundExamples | None, *, fewer_macs: float = FEWER_MACS, **spec: object
) -> Program:
    """Run the technique with MACs as its target."""
    step = PruneStructured.model_validate(
        {"kind": "prune_structured", "of": "macs", "ratio": 1 - 1 / fewer_macs, **spec}
    )
    with tempfile.TemporaryDirectory() as directory:
        outcome = run(program, step, Context(0, 1, Path(directory), examples, ignore))
    assert isinstance(outcome.program, Program)
    return outcome.program


def prune_with_script(program: Program, *, grouped: bool) -> Program:
    """Prune as Torch-Pruning's README does, with the smallest ratio (in steps of 0.01) that reaches the MACs.

    Left to itself it breaks this network, whose shortcuts pad channels; so the convolutions that write the residual
    stream are in ignored_layers.
    """
    budget = count_macs(program).total / FEWER_MACS
    for percent in range(40, 90):
        candidate = program.copy()
        module = candidate.module.eval()
        ignored = [
            layer
            for name, layer in module.named_modules()
            if name in ("conv1", "linear") or name.endswith("conv2")
        ]  # fmt: skip
        importance = tp.importance.GroupMagnitudeImportance(p=2) if grouped else tp.importance.MagnitudeImportance(p=2)
        inputs = candidate.example_inputs(2)
        pruner = tp.pruner.MagnitudePruner(
            module, inputs, importance=importance, pruning_ratio=percent / 100, ignored_layers=ignored,
            forward_fn=lambda network, given: network(*given),
        )  # fmt: skip
        pruner.step()
        if count_macs(candidate).total <= budget:
            return candidate
    raise AssertionError("no ratio reaches the MACs")


def with_pare(**spec: Any) -> Callable[[Program, BoundExamples], Program]:
    """Return Pare's method with these settings."""
    return lambda program, examples: prune_with_pare(program, examples, **spec)


TAYLOR = {"criterion": "taylor", "num_iterations": 4}
METHODS: dict[str, Callable[[Program, BoundExamples], Program]] = {
    "original": lambda program, _: program,
    "script, MagnitudeImportance": lambda program, _: prune_with_script(program, grouped=False),
    "script, GroupMagnitudeImportance": lambda program, _: prune_with_script(program, grouped=True),
    "pare, defaults": with_pare(),
    "pare, without data": lambda program, _: prune_with_pare(program, None),
    "pare, magnitude, round_to 1": with_pare(criterion="magnitude", round_to=1),
    "pare, magnitude, round_to 1, no compensation": with_pare(criterion="magnitude", round_to=1, compensate=False),
    **{f"pare, local, round_to {n}": with_pare(round_to=n) for n in (1, 4, 8, 16)},
    **{f"pare, taylor, 4 rounds, round_to {n}": with_pare(round_to=n, **TAYLOR) for n in (1, 4, 8)},
    **{
        f"pare, taylor, global, 4 rounds, round_to {n}": with_pare(round_to=n, scope="global", **TAYLOR)
        for n in (1, 2, 4, 8)
    },
    **{
        f"pare, taylor, global, 4 rounds, round_to 4, x{n} fewer": with_pare(
            round_to=4, scope="global", fewer_macs=n, **TAYLOR
        )
        for n in (2.2, 2.3, 2.4)
    },
    "pare, width too": with_pare(structures=["channels", "hidden_units", "heads", "width"]),
}
TIMED = (
    "script, MagnitudeImportance",
    *(f"pare, local, round_to {n}" for n in (1, 4, 8, 16)),
    *(f"pare, taylor, global, 4 rounds, round_to {n}" for n in (1, 2, 4)),
)


def open_training(program: Program, data: Path) -> BoundExamples:
    """Return the images, bound to the network's input."""
    files = {TRAIN: (data / "cifar10_train.npz", "npz"), TEST: (data / "cifar10_test.npz", "npz")}
    binding = {"column": "x", "layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": MEAN, "std": STD}
    recipe = {
        "dataset_id": TRAIN, "evaluation_dataset_id": TEST, "task": "classification", "label_column": "y",
        "inputs": {program.signature.inputs[0].name: binding},
    }  # fmt: skip
    return open_examples(Data.model_validate(recipe), files, program.signature, 0)  # type: ignore[arg-type]


def measure_accuracy(program: Program, data: Path, arguments: argparse.Namespace) -> None:
    """Print one row a method: pruned, and after the same fine-tuning."""
    settings = TrainingSettings.model_validate(
        {"epochs": arguments.epochs, "optimizer": "sgd", "learning_rate": 0.02, "batch_size": 128,
         "keep_best": False, "augmentations": ["flip"], "weight_decay": 5e-4}
    )  # fmt: skip
    examples = open_training(program, data)
    print(
        f"seed {arguments.seed}, {examples.num_training} images, {settings.epochs} epochs, {arguments.threads} threads"
    )
    print("\n| method | MACs | fewer MACs | parameters | accuracy pruned | accuracy fine-tuned | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    macs = count_macs(program).total
    for name in arguments.method or METHODS:
        seed_everything(arguments.seed)
        small = METHODS[name](program.copy(), examples)
        before = evaluate_module(small.module.eval(), examples, 250).value
        started_at = time.perf_counter()
        after = "-"
        if name != "original":
            if arguments.teacher and name.startswith("pare"):
                step = Distill.model_validate({"kind": "distill", **settings.model_dump()})
                context = Context(
                    arguments.seed, arguments.threads, Path(), examples, ignore, open_original=program.copy
                )
                distill.run(small, step, context)
            else:
                train(small, examples, settings, seed=arguments.seed, report=ignore)
            after = f"{evaluate_module(small.module.eval(), examples, 250).value:.4f}"
        counted = count_macs(small).total
        parameters = sum(parameter.numel() for parameter in small.module.parameters())
        seconds = time.perf_counter() - started_at
        row = (
            name,
            f"{counted:,}",
            f"x{macs / counted:.2f}",
            f"{parameters:,}",
            f"{before:.4f}",
            after,
            f"{seconds:.0f}",
        )
        print(f"| {' | '.join(row)} |", flush=True)


def measure_latency(program: Program, data: Path, arguments: argparse.Namespace) -> None:
    """Print the time of a batch in ONNX Runtime, each in turn with the original, for several roundings and threads."""
    examples = open_training(program, data)
    macs = count_macs(program).total
    with tempfile.TemporaryDirectory() as directory:
        original = Path(directory) / "original.onnx"
        export_onnx(program, original)
        batch = tuple(value.numpy() for value in program.example_inputs(BATCH))
        print(f"batch {BATCH}, {arguments.runs} calls each, taking turns\n")
        print("| variant | MACs | fewer MACs | threads | original p50 ms | p50 ms | faster |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in arguments.method or TIMED:
            try:
                small = METHODS[name](program.copy(), examples)
            except StepFailed as error:
                print(f"| {name} | {error.detail} | | | | | |")
                continue
            counted = count_macs(small).total
            path = Path(directory) / "small.onnx"
            export_onnx(small, path)
            for num_threads in (1, 2):
                one, other = (
                    open_model(each, "onnxruntime", program.signature, num_threads) for each in (original, path)
                )
                timings = time_interleaved(lambda f=one: f(batch), lambda f=other: f(batch), arguments.runs)  # type: ignore[misc]
                ratio = estimate_ratio(timings, 0)
                first, second = (
                    summarize(each, batch_size=BATCH, num_threads=num_threads).p50_ms
                    for each in (timings.original, timings.result)
                )
                print(
                    f"| {name} | {counted:,} | x{macs / counted:.2f} | {num_threads} | {first:.1f} | {second:.1f} | "
                    f"x{1 / ratio.value:.2f} (95 % CI {1 / ratio.high:.2f}..{1 / ratio.low:.2f}) |",
                    flush=True,
                )


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("accuracy", "latency"))
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", action="append", choices=tuple(METHODS))
    parser.add_argument("--teacher", action="store_true", help="accuracy: the original teaches what Pare pruned")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data or PARE_BENCH_DATA is needed")
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        program = open_program(arguments.data / "resnet20_cifar10.pt2", Path(directory))
    if arguments.part == "accuracy":
        measure_accuracy(program, arguments.data, arguments)
    else:
        measure_latency(program, arguments.data, arguments)


if __name__ == "__main__":
    main()
