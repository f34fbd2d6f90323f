"""Every way to fail has its own code and fix, and shows the values."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch._dynamo.exc import BackendCompilerFailed

from worker.engine.errors import ModelRejected
from worker.engine.failures import translate_failure


def caught(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as failure:
        return failure
    raise AssertionError("nothing failed")


def allocate_in_onnxruntime() -> None:
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [1])
    filled = helper.make_tensor_value_info("filled", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("ConstantOfShape", ["shape"], ["filled"])], "g", [shape], [filled])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"shape": np.array([2**50], np.int64)})


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**50), lambda: np.ones(2**50), lambda: bytearray(2**60), allocate_in_onnxruntime],
    ids=["torch", "numpy", "python", "onnxruntime"],
)
def test_a_refused_allocation_is_out_of_memory(allocate: Callable[[], object]) -> None:
    error = translate_failure(caught(allocate), "finetune")
    assert error.code == "out_of_memory"
    assert "'finetune'" in error.detail
    assert "batch_size" in error.fix


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 'out of memory'",
    ],
)
def test_so_is_what_cuda_refuses_past_torchs_allocator(message: str) -> None:
    assert translate_failure(RuntimeError(message), "finetune").code == "out_of_memory"


def test_so_is_one_within_the_compiler() -> None:
    codes = [
        translate_failure(BackendCompilerFailed(None, inner, None), "finetune").code
        for inner in (
            torch.OutOfMemoryError("CUDA out of memory"),
            caught(lambda: torch.empty(2**50)),
            ValueError("no"),
        )
    ]
    assert codes == ["out_of_memory", "out_of_memory", "compilation_failed"]


@pytest.mark.parametrize(
    ("norm", "shape"), [(torch.nn.BatchNorm1d(3), (1, 3)), (torch.nn.InstanceNorm1d(3), (2, 3, 1))], ids=str
)
def test_a_norm_with_a_single_value_is_named(norm: torch.nn.Module, shape: tuple[int, ...]) -> None:
    error = translate_failure(caught(lambda: norm.train()(torch.zeros(shape))), "finetune")
    assert error.code == "too_few_values_for_norm"
    assert "accumulate" in error.fix


def test_a_full_disk_is_storage_full_and_may_be_retried() -> None:
    def write() -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    error = translate_failure(caught(write), "export")
    assert (error.code, error.retryable) == ("storage_full", True)
    assert translate_failure(OSError(errno.EFBIG, "File too large"), "export").code == "storage_full"


def test_what_the_engine_understood_keeps_its_own_words() -> None:
    error = translate_failure(ModelRejected("the operator x is unknown", code="unknown_operator"), "open_model")
    assert (error.code, error.detail) == ("unknown_operator", "the operator x is unknown")


def test_anything_else_is_a_crash_with_its_stage_and_message() -> None:
    error = translate_failure(caught(lambda: torch.ones(2, 3) @ torch.ones(2, 3)), "measure")
    assert (error.code, error.retryable) == ("engine_crash", False)
    assert "RuntimeError in stage 'measure': mat1 and mat2 shapes cannot be multiplied" in error.detail
