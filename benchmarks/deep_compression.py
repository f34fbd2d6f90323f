"""ResNet-20 on CIFAR-10 pruned, its weights shared, and entropy-coded (Han et al. 2015): bytes and accuracy by stage.

    python benchmarks/deep_compression.py dense|compressed --data DIR [--seed 0] [--threads 2] [--epochs 6]
    python benchmarks/deep_compression.py dense --data DIR --save dense.pt2
    python benchmarks/deep_compression.py compressed --data DIR --teacher dense.pt2

DIR (or PARE_BENCH_DATA) holds resnet20_cifar10.pt2, cifar10_train.npz and cifar10_test.npz. Both are whole recipes run
by the engine, with the same number of epochs on the same images; `dense` only trains, `compressed` does the rest too.
With --teacher the long training of what was pruned is a `distill` step: that model teaches, labels help.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from app.recipes.metrics import Metrics
from app.recipes.plan import Plan
from worker.engine.actions import run_action
from worker.engine.artifacts import digest_file
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_packed import export_packed
from worker.engine.programs.export_safetensors import export_safetensors
from worker.engine.programs.intake import open_program
from worker.engine.progress import Reporter

TRAIN, TEST, TEACHER = "dst_" + "a" * 26, "dst_" + "b" * 26, "mdl_" + "a" * 26
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TRAINING: dict[str, Any] = {
    "batch_size": 128, "optimizer": "sgd", "weight_decay": 5e-4, "augmentations": ["flip"], "keep_best": False,
}  # fmt: skip
CENTROID_EPOCHS = 1
"""All but the last round of pruning are followed by an epoch; what is left fine-tunes."""


def list_steps(part: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the steps of a recipe; both parts train for as many epochs."""
    if part == "dense":
        return [{"kind": "finetune", "epochs": arguments.epochs, "learning_rate": arguments.learning_rate, **TRAINING}]
    rounds = arguments.rounds
    constant = {"epochs": 1, "learning_rate": arguments.learning_rate, "schedule": "constant", **TRAINING}
    gradual = {"schedule": "cubic", "num_iterations": rounds, "training": constant} if rounds > 1 else {}
    recover = {
        "epochs": arguments.epochs - CENTROID_EPOCHS - (rounds - 1), "learning_rate": arguments.learning_rate,
        **TRAINING,
    }  # fmt: skip
    return [
        {"kind": "prune_magnitude", "sparsity": arguments.sparsity, "scope": "global", **gradual},
        {"kind": "distill", "teacher_model_id": TEACHER, **recover}
        if arguments.teacher
        else {"kind": "finetune", **recover},
        {
            "kind": "share_weights", "bits": arguments.bits,
            "training": {"epochs": CENTROID_EPOCHS, "learning_rate": 0.005, **TRAINING},
        },
    ]  # fmt: skip


def run(part: str, data: Path, directory: Path, arguments: argparse.Namespace) -> Metrics:
    """Run one recipe as a worker would, with the files in DIR/in."""
    files = {"model.pt2": "resnet20_cifar10.pt2", "train.npz": "cifar10_train.npz", "test.npz": "cifar10_test.npz"}
    (directory / "in").mkdir(parents=True)
    (directory / "tmp").mkdir()
    for name, source in files.items():
        shutil.copyfile(data / source, directory / "in" / name)
    teachers = []
    if arguments.teacher:
        shutil.copyfile(arguments.teacher, directory / "in" / "teacher.pt2")
        digest = digest_file(directory / "in" / "teacher.pt2")
        teachers = [{"id": TEACHER, "file": "teacher.pt2", "format": "pt2", "sha256": digest}]
    binding = {"column": "x", "layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": MEAN, "std": STD}
    plan = Plan.model_validate(
        {
            "action": "optimize",
            "model": {
                "file": "model.pt2", "format": "pt2", "sha256": digest_file(directory / "in" / "model.pt2"),
            },
            "teachers": teachers,
            "datasets": [
                {
                    "id": name, "file": file, "format": "npz", "sha256": digest_file(directory / "in" / file),
                }
                for name, file in ((TRAIN, "train.npz"), (TEST, "test.npz"))
            ],
            "recipe": {
                "steps": list_steps(part, arguments),
                "data": {
                    "dataset_id": TRAIN, "evaluation_dataset_id": TEST, "inputs": {"x": binding}, "label_column": "y",
                    "task": "classification",
                },
                "outputs": {"formats": ["onnx", "packed", *(["pt2"] if arguments.save else [])]},
                "target": {"num_runs": 20},
                "seed": arguments.seed,
            },
            "isolation": ["none"],
            "num_threads": arguments.threads,
        }
    )  # fmt: skip
    metrics = run_action(plan, directory, Reporter(lambda _: None)).metrics
    assert metrics is not None
    if arguments.save:
        shutil.copyfile(directory / "out" / "artifacts" / "model.pt2", arguments.save)
    return metrics


def measure_original(data: Path, directory: Path) -> dict[str, int]:
    """Return the bytes of the original's files."""
    program = open_program(data / "resnet20_cifar10.pt2", directory)
    sizes = {}
    for name, export in (
        ("model.onnx", export_onnx), ("model.safetensors", export_safetensors), ("model.packed", export_packed)
    ):  # fmt: skip
        export(program, directory / name)
        sizes[name] = (directory / name).stat().st_size
    return sizes


def report(part: str, metrics: Metrics, original: dict[str, int], seconds: float) -> None:
    """Print what came out as a table."""
    before, after = metrics.baseline, metrics.result
    assert before.quality is not None
    assert after.quality is not None
    assert after.packed_bytes is not None
    print("| step | weights not zero | packed weights and buffers, bytes | facts |\n|---|---|---|---|")
    for step in metrics.steps:
        shown = ("sparsity", "bits_per_weight", "clusters", "quality_before", "quality_after", "epochs_run")
        facts = ", ".join(f"{name} {step.facts[name]:.4g}" for name in shown if name in step.facts)
        print(f"| {step.kind} | {step.nonzero_parameters:,} of {step.parameters:,} | {step.packed_bytes:,} | {facts} |")
    print(f"\n| {part} | original | result | times smaller |\n|---|---|---|---|")
    print(
        f"| accuracy | {before.quality.value:.4f} | {after.quality.value:.4f} +- {after.quality.standard_error:.4f} | |"
    )
    for name, size in original.items():
        times = size / after.packed_bytes
        print(f"| model.packed, against the original's {name} | {size:,} | {after.packed_bytes:,} | {times:.1f} |")
    print(f"| model.onnx | {before.file_bytes:,} | {after.file_bytes:,} | {before.file_bytes / after.file_bytes:.1f} |")
    print(f"\n{metrics.verdict.summary}\n{seconds:.0f} s")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["dense", "compressed"])
    parser.add_argument("--data", default=os.environ.get("PARE_BENCH_DATA"), type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of pruning")
    parser.add_argument("--epochs", type=int, default=6, help="of all training together")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--teacher", type=Path, help="compressed: a model file to learn from")
    parser.add_argument("--save", type=Path, help="where to put the result's model.pt2")
    arguments = parser.parse_args()
    if not 1 <= arguments.rounds < arguments.epochs - CENTROID_EPOCHS:
        parser.error("--rounds must leave an epoch to fine-tune")
    if arguments.data is None:
        parser.error("--data or PARE_BENCH_DATA must name the directory with the model and the images")
    print(
        f"{arguments.part}: seed {arguments.seed}, {arguments.epochs} epochs, {arguments.threads} threads\n", flush=True
    )
    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "original").mkdir()
        original = measure_original(arguments.data, Path(directory) / "original")
        metrics = run(arguments.part, arguments.data, Path(directory) / "job", arguments)
    report(arguments.part, metrics, original, time.perf_counter() - started_at)


if __name__ == "__main__":
    main()
