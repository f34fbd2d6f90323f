"""Turning whatever ended an action into the error of result.json: a stable code, the values, the fix."""

import errno

import onnxruntime
import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from app.recipes.plan import EngineError
from worker.engine.errors import EngineFailure

MAX_DETAIL_CHARACTERS = 8000
MAX_MESSAGE_CHARACTERS = 1000

ALLOCATION_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "Failed to allocate memory",
    "bad allocation",
    "bad_alloc",
    "CUDA error: out of memory",
    "Cuda failure 'out of memory'",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What torch's CPU allocator and ONNX Runtime say in exceptions that have no type of their own for it; then the CUDA
runtime (page-locked memory, contexts), NCCL, cuBLAS and cuDNN, which ask the driver past torch's allocator."""

LONELY_MESSAGES = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")
"""What torch says where a norm in training sees a single number of a channel."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def translate_failure(failure: Exception, stage: str) -> EngineError:
    """Return the error that the user sees. A traceback belongs to the log, never in here."""
    if isinstance(failure, EngineFailure):
        return EngineError(
            code=failure.code,
            detail=failure.detail[:MAX_DETAIL_CHARACTERS],
            fix=failure.fix,
            retryable=failure.retryable,
        )
    if is_out_of_memory(failure):
        return EngineError(
            code="out_of_memory",
            detail=f"memory ran out in stage {stage!r}: {_message(failure)}",
            fix="Use a smaller batch_size in the recipe's steps and target, or a worker with more memory.",
        )
    if is_failed_compilation(failure):
        return EngineError(
            code="compilation_failed",
            detail=f"torch could not compile the model in stage {stage!r}: {_message(failure)}",
            fix="Set compile to false in the recipe's steps: the weights are the same up to rounding.",
        )
    if isinstance(failure, ValueError) and any(each in str(failure) for each in LONELY_MESSAGES):
        return EngineError(
            code="too_few_values_for_norm",
            detail=f"a norm of the model has nothing to take a mean over in stage {stage!r}: {_message(failure)}",
            fix="Train with more examples at a time: a larger batch_size or a smaller accumulate.",
        )
    if isinstance(failure, OSError) and failure.errno in FULL_DISK:
        return EngineError(
            code="storage_full",
            detail=f"the job's directory has no room left in stage {stage!r}: {failure.strerror}",
            fix="Free space on the worker's disk or raise the limit of a job's directory; then retry.",
            retryable=True,
        )
    return EngineError(
        code="engine_crash",
        detail=f"{type(failure).__name__} in stage {stage!r}: {_message(failure)}",
        fix="Look at the job's log, which has the traceback, and report this as a defect of Pare.",
    )


def is_out_of_memory(failure: Exception) -> bool:
    """Whether an exception means that an allocation was refused."""
    if isinstance(failure, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(failure, BackendCompilerFailed):
        return is_out_of_memory(failure.inner_exception)
    foreign = isinstance(failure, RuntimeError) or type(failure).__module__.startswith(onnxruntime.__name__)
    return foreign and any(each in str(failure) for each in ALLOCATION_MESSAGES)


def is_failed_compilation(failure: Exception) -> bool:
    """Whether torch.compile raised an exception, and not the model that it compiled."""
    return isinstance(failure, TorchDynamoException)


def _message(failure: Exception) -> str:
    return (str(failure) or "no message")[:MAX_MESSAGE_CHARACTERS]
