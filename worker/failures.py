"""How an attempt can end other than with a result.

AttemptEnded           the engine must go now
  AttemptFailed        with an error for the user
  AttemptCancelled     the user cancelled it
  AttemptLost          the job may belong to another worker: say nothing
  AttemptReleased      this worker stops: the job goes back, the attempt does not count
"""

import re
import signal

from app.errors import StorageFull
from app.recipes.plan import EngineError

_DEFECT = "Look at the job's log; if the model and recipe are right, report this as a defect of Pare."
_MEMORY_WORDS = re.compile(rb"MemoryError|can't allocate memory|bad_alloc|out of memory|Cannot allocate memory", re.I)
_DISK_WORDS = re.compile(rb"No space left on device|Disk quota exceeded")
_SETUP_FAILED = 97


class AttemptEnded(Exception):
    """The attempt is over."""


class AttemptFailed(AttemptEnded):
    """The attempt failed."""

    def __init__(self, error: EngineError) -> None:
        self.error = error
        super().__init__(f"{error.code}: {error.detail}")


class AttemptCancelled(AttemptEnded):
    """The job was cancelled."""


class AttemptLost(AttemptEnded):
    """The job is lost."""


class AttemptReleased(AttemptEnded):
    """The worker stops."""


def defect(code: str, detail: str, *, retryable: bool = False) -> EngineError:
    """Describe a failure that neither the user nor the operator has caused."""
    return EngineError(code=code, detail=detail, fix=_DEFECT, retryable=retryable)


def describe_second_shortage(error: EngineError) -> EngineError:
    """Say that smaller parts of batches did not help either, where it was memory again."""
    if error.code != "out_of_memory":
        return error
    return EngineError(
        code=error.code,
        detail=f"{error.detail}; it did so before, with batches in half as many parts",
        fix="Use a smaller model or batch_size, or a larger accumulate, or raise PARE_ENGINE_MEMORY_BYTES.",
    )


def describe_exit(status: int, log_tail: bytes) -> EngineError:
    """Say why an engine ended with this status and without a result."""
    if _MEMORY_WORDS.search(log_tail):
        return EngineError(
            code="out_of_memory",
            detail=f"the engine ran out of memory and ended with status {status}",
            fix="Use a smaller model or batch_size, or raise PARE_ENGINE_MEMORY_BYTES.",
        )
    if _DISK_WORDS.search(log_tail):  # it could not even write down that it could not write
        return EngineError(
            code="storage_full",
            detail=f"the disk of the worker has no space for the job's files; the engine ended with status {status}",
            fix=StorageFull.fix,
            retryable=True,
        )
    if status == _SETUP_FAILED and b"sandbox:" in log_tail:
        return defect("sandbox_failed", "the sandbox of the engine could not be made", retryable=True)
    if status == 128 + signal.SIGKILL:
        return EngineError(
            code="engine_killed",
            detail="the engine was killed from outside, by the kernel for want of memory or by a person",
            fix="See whether the machine has enough memory for the model, then retry the job.",
            retryable=True,
        )
    if status == 128 + signal.SIGXFSZ:
        return EngineError(
            code="file_too_large",
            detail="the engine wrote a file larger than the limit",
            fix="Use a smaller model, or raise PARE_MAX_ARTIFACT_BYTES.",
        )
    if status > 128:
        number = status - 128
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return defect("engine_crashed", f"the engine crashed with {name}")
    return defect("engine_failed", f"the engine ended with status {status} and without a result")
