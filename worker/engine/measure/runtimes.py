"""Opening a model file in the runtime that will serve it: arrays in, arrays out, on a device, with so many threads."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch.export.passes import move_to_device_pass

from app.recipes.base import Runtime
from app.recipes.recipe import Target
from worker.engine.devices import CPU, move
from worker.engine.measure.latency import Call, Timings, time_interleaved, time_on_cuda
from worker.engine.programs.program import Signature

Arrays = tuple[NDArray[np.generic], ...]
Predict = Callable[[Arrays], Arrays]

SUFFIXES: dict[Runtime, str] = {"onnxruntime": ".onnx", "aotinductor": ".aoti.pt2", "torch": ".pt2"}
"""The end of the name of the file that each runtime opens; the first that fits counts."""


def runtime_of(path: Path) -> Runtime:
    """Return the runtime that opens a file."""
    return next(runtime for runtime, suffix in SUFFIXES.items() if path.name.endswith(suffix))


def measured_on(target: Target) -> torch.device:
    """Return the device on which a recipe's models are measured; the recipe's job has chosen it before."""
    return CPU if target.device == "cpu" else torch.device("cuda", 0)


def open_model(
    path: Path, runtime: Runtime, signature: Signature, num_threads: int, device: torch.device = CPU
) -> Predict:
    """Return a function of the model's inputs, in the order of the signature, that returns its outputs.

    ONNX Runtime runs on the CPU only.
    """
    if runtime == "onnxruntime":
        assert device == CPU, "the recipe's validation asks for a runtime of torch on a GPU"
        return _open_onnx(path, signature, num_threads)
    return TorchModel(_open_package(path) if runtime == "aotinductor" else _open_pt2(path, device), num_threads, device)


def time_models(
    original: Predict,
    result: Predict,
    arrays: Arrays,
    num_runs: int,
    report: Callable[[float], None] = lambda _: None,
) -> Timings:
    """Time calls of two models on the same inputs, taking turns: on a GPU by its own clock, without the transfers."""
    if isinstance(original, TorchModel) and isinstance(result, TorchModel) and original.device != CPU:
        return time_interleaved(original.prepare(arrays), result.prepare(arrays), num_runs, report, time_on_cuda)
    return time_interleaved(lambda: original(arrays), lambda: result(arrays), num_runs, report)


def _open_onnx(path: Path, signature: Signature, num_threads: int) -> Predict:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Two models take turns: threads of the one that waits must not spin on the cores of the one that runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [each.name for each in signature.inputs]
    outputs = [each.name for each in signature.outputs]
    kept = {each.name for each in session.get_inputs()}

    def predict(arrays: Arrays) -> Arrays:
        feed = {name: array for name, array in zip(inputs, arrays, strict=True) if name in kept}
        return tuple(session.run(outputs, feed))

    return predict


def _open_pt2(path: Path, device: torch.device) -> Callable[..., object]:
    exported = torch.export.load(path)
    # Constants that the graph makes itself (arange, zeros) move along.
    return (exported if device == CPU else move_to_device_pass(exported, device)).module()


def _open_package(path: Path) -> Callable[..., object]:
    # Not torch._inductor.aoti_load_package, which calls a C++ compiler, if there is one, to learn what this processor
    # can; and the signatures of Pare's programs are flat, so that no structure has to be read at every call.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    return lambda *inputs: loader.run(list(inputs))


class TorchModel:
    """A model of torch on a device. Arrays come from the CPU and go back there; a prepared call leaves both out."""

    def __init__(self, module: Callable[..., object], num_threads: int, device: torch.device) -> None:
        self._module = module
        self._num_threads = num_threads
        self.device = device

    def __call__(self, arrays: Arrays) -> Arrays:
        """Return the outputs as arrays."""
        outputs = self._run(self._bring(arrays))
        return tuple(each.cpu().numpy() for each in torch.utils._pytree.tree_leaves(outputs))

    def prepare(self, arrays: Arrays) -> Call:
        """Return a call on inputs that are on the device already, whose outputs stay there."""
        return partial(self._run, self._bring(arrays))

    def _bring(self, arrays: Arrays) -> tuple[torch.Tensor, ...]:
        return move((torch.from_numpy(array) for array in arrays), self.device)

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> object:
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            return self._module(*inputs)
