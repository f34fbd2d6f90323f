"""What can go wrong on the service side; one tree, no HTTP in it (app/api maps each to a status in one place).

    PareError                  code, detail, fix, retryable
      NotAuthenticated         no key, or not a valid one
      Forbidden                the key is not for this
      TooManyRequests          more than is allowed; `retry_after_seconds` says when there is room again
        QuotaExceeded          more than this owner may have; `policy` says of what
      NotFound                 no such thing, or not yours
      Conflict                 the thing is in a state that forbids this
        NotReady               an upload is still being checked
        OffsetMismatch         bytes were sent for another place of a resumable upload
        StillRunning           the first request with this Idempotency-Key has not been answered yet
      InvalidRequest           the request does not fit; `errors` lists every problem with its place
      IdempotencyMismatch      an Idempotency-Key was used before with another request
      UnsupportedFormat        the bytes are in a format that Pare does not take
      TooLarge                 more bytes than the limit
      RangeNotSatisfiable      a byte range outside the file
      PreconditionFailed       the thing is not in the version the client expects
        VersionUnsupported     a resumable upload in another version of the protocol
      ChecksumMismatch         bytes arrived changed
      Gone                     there was such a thing, but its time is over
      StorageFull              no space left for the bytes
      StorageCorrupt           stored bytes do not match their digest
        BlobMissing            stored bytes are gone
      Unavailable              a part the service depends on does not answer
        ReducedCapacity        too much is asked of the service at once
        SchemaMissing          the database was never migrated, or not far enough
        IsolationMissing       no worker can keep strangers' models away from its machine
      ConfigurationError       a setting that the service cannot work with

The docstring of a class is its default message; `detail` holds the values.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: a JSON pointer into its body, and what is expected there."""

    pointer: str
    detail: str


class PareError(Exception):
    """Something went wrong in Pare."""

    code: str = "internal_error"
    fix: str = "Try again; if it happens again, report it with the request id."
    retryable: bool = False

    def __init__(
        self,
        detail: str | None = None,
        *,
        code: str | None = None,
        fix: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        self.detail = detail or (self.__doc__ or "").strip()
        self.code = code or self.code
        self.fix = fix or self.fix
        self.retryable = self.retryable if retryable is None else retryable
        super().__init__(self.detail)


class NotAuthenticated(PareError):
    """A key is needed."""

    code = "not_authenticated"
    fix = "Send a valid key: `Authorization: Bearer pare_...` (the client: PARE_API_KEY). An administrator makes keys."


class Forbidden(PareError):
    """The key is not for this."""

    code = "missing_scope"
    fix = "Use a key that has this scope; GET /v1/me says what this one has."

    def __init__(self, scope: str) -> None:
        self.scope = scope
        super().__init__(f"this needs a key with the scope {scope!r}")


class TooManyRequests(PareError):
    """More than is allowed."""

    code = "too_many_requests"
    fix = "Wait for as long as Retry-After says."
    retryable = True

    def __init__(
        self,
        detail: str,
        retry_after_seconds: float | None,
        *,
        code: str | None = None,
        fix: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(detail, code=code, fix=fix, retryable=retryable)


class QuotaExceeded(TooManyRequests):
    """More than this owner may have."""

    code = "quota_exceeded"

    def __init__(
        self,
        policy: str,
        detail: str,
        *,
        retry_after_seconds: float | None = None,
        fix: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        self.policy = policy
        super().__init__(detail, retry_after_seconds, fix=fix, retryable=retryable)


class NotFound(PareError):
    """There is no such thing."""

    code = "not_found"
    fix = "Check the id; list what exists with GET on the collection."


class Conflict(PareError):
    """The state of the thing forbids this."""

    code = "conflict"
    fix = "Look at the current state first."


class NotReady(Conflict):
    """The upload is still being checked."""

    code = "not_ready"
    fix = "Wait until its state is 'ready', then send the request again."
    retryable = True


class OffsetMismatch(Conflict):
    """The upload goes on at another offset."""

    code = "offset_mismatch"
    fix = "Go on at the offset in the Upload-Offset header; HEAD on the upload says it as well."

    def __init__(self, offset: int | None = None, detail: str | None = None) -> None:
        self.offset = offset
        super().__init__(detail or f"the upload goes on at offset {offset}")


class StillRunning(Conflict):
    """The first request with this Idempotency-Key is still being worked on."""

    code = "idempotency_key_in_use"
    fix = "Send the same request again in a moment; it gets the answer of the first."
    retryable = True


class InvalidRequest(PareError):
    """The request does not fit."""

    code = "invalid_request"
    fix = "Correct the places named in `errors` and send the request again."

    def __init__(self, errors: list[Problem], detail: str | None = None, *, code: str | None = None) -> None:
        self.errors = errors
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(detail or f"{first.pointer or '/'}: {first.detail}{more}", code=code)


class IdempotencyMismatch(PareError):
    """This Idempotency-Key was used before with a different request."""

    code = "idempotency_key_reused"
    fix = "Use a new key for a new request."


class UnsupportedFormat(PareError):
    """Pare does not take this format."""

    code = "unsupported_format"
    fix = "Models: a .pt2 file of torch.export.save. Datasets: .npz or .safetensors."


class TooLarge(PareError):
    """More bytes than the limit."""

    code = "too_large"
    fix = "Send a smaller body, or raise the limit in the service's settings."


class RangeNotSatisfiable(PareError):
    """The byte range lies outside the file."""

    code = "range_not_satisfiable"
    fix = "Ask for a range within size_bytes."

    def __init__(self, size_bytes: int, detail: str | None = None) -> None:
        self.size_bytes = size_bytes
        super().__init__(detail or f"the file has {size_bytes} bytes")


class PreconditionFailed(PareError):
    """The thing is not in the version the request expects."""

    code = "precondition_failed"
    fix = "Read it again and use the current ETag."


class VersionUnsupported(PreconditionFailed):
    """Resumable uploads follow version 1.0.0 of the tus protocol."""

    code = "tus_version"
    fix = "Send the header `Tus-Resumable: 1.0.0`."


class ChecksumMismatch(PareError):
    """The bytes are not those of the checksum; they were dropped."""

    code = "checksum_mismatch"
    fix = "Send them again."
    retryable = True


class Gone(PareError):
    """The time of this thing is over."""

    code = "gone"
    fix = "Begin again."


class StorageFull(PareError):
    """There is no space left in storage."""

    code = "storage_full"
    fix = "Give the volume that holds the store and the database more space, then try again."
    retryable = True


class StorageCorrupt(PareError):
    """Stored bytes do not match their digest."""

    code = "integrity"
    fix = "Restore the file from a backup, or upload it again."


class BlobMissing(StorageCorrupt):
    """Stored bytes are gone."""

    code = "blob_missing"


class Unavailable(PareError):
    """A part that the service depends on does not answer."""

    code = "unavailable"
    fix = "Try again in a few seconds."
    retryable = True


class ReducedCapacity(Unavailable):
    """Too much is asked of the service at once."""

    code = "temporary_reduced_capacity"


class SchemaMissing(Unavailable):
    """The database lacks tables or columns of this version."""

    code = "schema_missing"
    fix = "Run the migrations: python -m app.db"


class IsolationMissing(Unavailable):
    """The workers refuse jobs, because nothing on their machines can isolate them."""

    code = "isolation_unavailable"
    fix = "Install bubblewrap on the workers or allow unprivileged user namespaces; GET /v1/workers says what failed."


class ConfigurationError(PareError):
    """A setting does not make sense."""

    code = "configuration_error"
    fix = "Correct the setting named in the detail and start again."
