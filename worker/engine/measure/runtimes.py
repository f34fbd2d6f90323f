"""Opening a model file in the runtime that will serve it: arrays in, arrays out, with a fixed number of threads."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from worker.engine.programs.program import Signature

Runtime = Literal["onnxruntime", "torch"]
Arrays = tuple[NDArray[np.generic], ...]
Predict = Callable[[Arrays], Arrays]

SUFFIXES: dict[Runtime, str] = {"onnxruntime": ".onnx", "torch": ".pt2"}
"""The file each runtime opens."""


def open_model(path: Path, runtime: Runtime, signature: Signature, num_threads: int) -> Predict:
    """Return a function of the model's inputs, in the order of the signature, that returns its outputs."""
    if runtime == "onnxruntime":
        return _open_onnx(path, signature, num_threads)
    return _open_pt2(path, num_threads)


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


def _open_pt2(path: Path, num_threads: int) -> Predict:
    module = torch.export.load(path).module()

    def predict(arrays: Arrays) -> Arrays:
        torch.set_num_threads(num_threads)
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in arrays))
        return tuple(each.numpy() for each in torch.utils._pytree.tree_leaves(outputs))

    return predict
