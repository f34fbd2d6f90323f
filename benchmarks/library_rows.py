"""What benchmarks/libraries.py compares: one function per row, each the way a library's own documentation shows it."""

import copy
import importlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from app.recipes.recipe import KINDS
from benchmarks.mixed_precision import Subject
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_packed import export_packed
from worker.engine.programs.program import FileProgram, Program
from worker.engine.techniques.base import Context
from worker.engine.techniques.registry import TECHNIQUES

Outputs = Callable[[tuple[np.ndarray, ...]], np.ndarray]


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

    def pare(self, note: str = "", *, packed: bool = False, **step: Any) -> Result:
        """Run one step of Pare and export what it leaves to ONNX; `packed`: the note tells the size of model.packed."""
        scratch = self.scratch()
        program = self.open()
        spec = KINDS[step["kind"]].model_validate(step)
        context = Context(0, 1, scratch, self.subject.examples, lambda *_, **__: None)
        started_at = time.perf_counter()
        outcome = TECHNIQUES[step["kind"]].run(program, spec, context)
        path = scratch / "model.onnx"
        if isinstance(outcome.program, FileProgram):
            path = outcome.program.path
        else:
            export_onnx(outcome.program, path)
            if packed:
                export_packed(outcome.program, scratch / "model.packed")
                note = f"model.packed: {(scratch / 'model.packed').stat().st_size / 2**20:.2f} MiB. {note}"
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
    return bench.pare("ONNX stores the zeros", packed=True, kind="prune_magnitude", sparsity=0.5)


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


def int8_weight_only_pare(bench: Bench) -> Result:
    """Store weights in 8 bits with Pare."""
    return bench.pare("embeddings too", kind="quantize_int8", mode="weight_only")


def int4_rtn_pare(bench: Bench) -> Result:
    """Store linear weights in 4 bits with Pare, rounded to nearest."""
    return bench.pare(packed=True, kind="quantize_int4", method="rtn", group_size=32)


def int4_gptq_pare(bench: Bench) -> Result:
    """Store linear weights in 4 bits with Pare, errors made good on 128 calibration rows."""
    return bench.pare(packed=True, kind="quantize_int4", method="gptq", group_size=32, num_calibration_examples=128)


def mixed_pare(bench: Bench) -> Result:
    """Choose a precision per layer at a sixth of the bytes."""
    return bench.pare(
        packed=True,
        kind="quantize_mixed",
        method="rtn",
        max_size_ratio=1 / 6,
        num_calibration_examples=32,
    )


def _neural_compressor(bench: Bench, bits: int) -> Result:
    library = importlib.import_module("neural_compressor.torch.quantization")
    module = copy.deepcopy(bench.open().module)
    started_at = time.perf_counter()
    module = library.convert(library.prepare(module, library.RTNConfig(bits=bits, group_size=32)))
    return bench.torch(module, time.perf_counter() - started_at, "weight only, round to nearest")


def int8_neural_compressor(bench: Bench) -> Result:
    """Store linear weights in 8 bits with Intel Neural Compressor, where it is installed."""
    return _neural_compressor(bench, 8)


def int4_neural_compressor(bench: Bench) -> Result:
    """Store linear weights in 4 bits with Intel Neural Compressor, where it is installed."""
    return _neural_compressor(bench, 4)


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
    "int8 weights, Neural Compressor": ("minilm", "torch", int8_neural_compressor),
    "int8 weights, Pare": ("minilm", "ONNX Runtime", int8_weight_only_pare),
    "int4 weights, torchao": ("minilm", "torch", int4_weight_only_torchao),
    "int4 weights, Neural Compressor": ("minilm", "torch", int4_neural_compressor),
    "int4 weights, rounded, Pare": ("minilm", "ONNX Runtime", int4_rtn_pare),
    "int4 weights, GPTQ, Pare": ("minilm", "ONNX Runtime", int4_gptq_pare),
    "mixed at 1/6, Pare": ("minilm", "ONNX Runtime", mixed_pare),
}
"""Name -> model, runtime, function. A library that is not installed, or cannot do it here, says so in its row."""
