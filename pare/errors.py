"""Everything that can go wrong for a user of the client, each with a code, the values and what to do about it.

PareError
  NotReachable            nobody answers at the address
  Refused                 the service answered with a problem (RFC 9457)
    AccessDenied          401, 403: no key, not a valid one, or one that is not for this
    NotFound              404
    Conflict              409
    InvalidRequest        400, 415, 422: every problem with its place in `problems`
    TooLarge              413
    Unavailable           429, 502, 503, 504, 507: a later try may succeed
  UploadRejected          the service read the file and did not accept it
  TransferCorrupt         the bytes that arrived are not the bytes that were sent
  JobFailed               the job ended without a result
    JobCancelled
  JobNotFinished          asked for the result of a job that still goes on
  ExportFailed            torch.export could not make a program of the module
  DataUnusable            the data cannot be uploaded or bound to the model's inputs
  WaitTimeout             it did not finish in the time that was given
  WebhookInvalid          a message to a webhook is forged, changed or too old
  UsageError              the call itself makes no sense
  SetupMissing            an optional package is not installed
"""

from dataclasses import dataclass
from typing import Any


class PareError(Exception):
    """Something went wrong."""

    def __init__(self, detail: str, *, code: str, fix: str = "", retryable: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.fix = fix
        self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" + (f" Fix: {self.fix}" if self.fix else "")

    def to_json(self) -> dict[str, Any]:
        """Return the error as the object that `-o json` prints."""
        return {"code": self.code, "detail": self.detail, "fix": self.fix, "retryable": self.retryable}


class NotReachable(PareError):
    """Nobody answers at the address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"no answer from {url} ({reason})",
            code="not_reachable",
            fix="Start the service with `pare serve`, or give its address with --url or PARE_URL.",
            retryable=True,
        )
        self.url = url


@dataclass(frozen=True)
class Problem:
    """One of several things wrong with a request."""

    pointer: str
    detail: str


class Refused(PareError):
    """The service answered with a problem."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(
            str(problem.get("detail") or problem.get("title") or f"HTTP status {status}"),
            code=str(problem.get("code") or f"http_{status}"),
            fix=str(problem.get("fix") or ""),
            retryable=bool(problem.get("retryable", False)),
        )
        self.status = status
        self.request_id: str | None = problem.get("request_id")
        self.problems = tuple(
            Problem(str(item.get("pointer", "")), str(item.get("detail", ""))) for item in problem.get("errors") or ()
        )
        self.problem = problem

    def __str__(self) -> str:
        lines = [super().__str__(), *(f"  {problem.pointer}: {problem.detail}" for problem in self.problems)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), **self.problem, "status": self.status}


class AccessDenied(Refused):
    """The service wants a key, or another one."""


class NotFound(Refused):
    """The service knows no such thing."""


class Conflict(Refused):
    """The thing is in a state that does not allow it."""


class InvalidRequest(Refused):
    """The request makes no sense to the service; `problems` lists every reason with its place."""


class TooLarge(Refused):
    """The body is over the service's limit."""


class Unavailable(Refused):
    """The service cannot do it now."""


class UploadRejected(PareError):
    """The service read the file and did not accept it."""

    def __init__(self, kind: str, id: str, error: dict[str, Any]) -> None:
        super().__init__(
            f"{kind} {id} was rejected: {error.get('detail', 'no reason given')}",
            code=str(error.get("code", "rejected")),
            fix=str(error.get("fix", "")),
        )
        self.id = id


class TransferCorrupt(PareError):
    """The bytes that arrived are not the bytes that were sent."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{what}: expected sha256 {expected}, got {actual}",
            code="transfer_corrupt",
            fix="Try again; if it stays, something on the way or on a disk changes bytes.",
            retryable=True,
        )


class JobFailed(PareError):
    """The job ended without a result."""

    def __init__(self, job_id: str, error: dict[str, Any] | None) -> None:
        error = error or {}
        super().__init__(
            f"job {job_id} failed: {error.get('detail', 'no reason given')}",
            code=str(error.get("code", "job_failed")),
            fix=str(error.get("fix", "") or f"See `pare jobs logs {job_id}`."),
            retryable=bool(error.get("retryable", False)),
        )
        self.job_id = job_id


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id, {"code": "job_cancelled", "detail": "it was cancelled", "fix": "Retry or submit it."})


class JobNotFinished(PareError):
    """Asked for the result of a job that still goes on."""

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(
            f"job {job_id} is {status}",
            code="job_not_finished",
            fix=f"Wait for it: `pare jobs wait {job_id}` or Client().result({job_id!r}).",
            retryable=True,
        )


class ExportFailed(PareError):
    """torch.export could not make a program of the module."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            detail,
            code="export_failed",
            fix="Check that module(*example_inputs) works in eval mode and that forward() has no data-dependent Python "
            "branches; torch.export.export(module, example_inputs) shows the full reason.",
        )


class DataUnusable(PareError):
    """The data cannot be uploaded or bound to the model's inputs."""

    def __init__(self, detail: str, *, fix: str) -> None:
        super().__init__(detail, code="data_unusable", fix=fix)


class WaitTimeout(PareError):
    """It did not finish in the time that was given."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(
            f"{what} did not finish within {seconds:g} s",
            code="wait_timeout",
            fix="It goes on in the service; wait again, or longer.",
            retryable=True,
        )


class WebhookInvalid(PareError):
    """A message to a webhook is forged, changed or too old."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            detail,
            code="webhook_invalid",
            fix="Do nothing with it; answer 401. If it should be genuine, compare the secret and this machine's clock.",
        )


class UsageError(PareError):
    """The call itself makes no sense."""

    def __init__(self, detail: str, *, fix: str = "") -> None:
        super().__init__(detail, code="usage", fix=fix)


class SetupMissing(PareError):
    """An optional package is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package!r}, which is not installed",
            code="setup_missing",
            fix=f"Install it: pip install 'pare[{extra}]'.",
        )


_BY_STATUS: dict[int, type[Refused]] = {
    400: InvalidRequest,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    415: InvalidRequest,
    422: InvalidRequest,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
    507: Unavailable,
}


def refused(status: int, problem: dict[str, Any]) -> Refused:
    """Return the error for an HTTP answer that is not a success."""
    return _BY_STATUS.get(status, Refused)(status, problem)
