"""Every error becomes an RFC 9457 problem here, and only here: ours, the framework's, and those nobody expected."""

import json
import math
import re
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from app.errors import (
    ChecksumMismatch,
    Conflict,
    Forbidden,
    Gone,
    IdempotencyMismatch,
    InvalidRequest,
    NotAuthenticated,
    NotFound,
    OffsetMismatch,
    PareError,
    PreconditionFailed,
    Problem,
    QuotaExceeded,
    RangeNotSatisfiable,
    StillRunning,
    StorageCorrupt,
    StorageFull,
    TooLarge,
    TooManyRequests,
    Unavailable,
    UnsupportedFormat,
    VersionUnsupported,
)
from app.logs import current_request_id

IANA = "https://iana.org/assignments/http-problem-types#"
TYPES = {
    "quota_exceeded": f"{IANA}quota-exceeded",
    "temporary_reduced_capacity": f"{IANA}temporary-reduced-capacity",
}
"""Kinds of problems that have a name of their own (draft-ietf-httpapi-ratelimit-headers-10, section 5)."""
MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 100
"""A request with more mistakes than this gets the first ones."""

CHECKSUM_MISMATCH = 460
"""As the tus protocol says; the standard has no status for it."""
TUS_VERSION = "1.0.0"

STATUSES: dict[type[PareError], int] = {
    ChecksumMismatch: CHECKSUM_MISMATCH,
    Gone: HTTPStatus.GONE,
    NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    TooManyRequests: HTTPStatus.TOO_MANY_REQUESTS,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    PreconditionFailed: HTTPStatus.PRECONDITION_FAILED,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedFormat: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    RangeNotSatisfiable: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    InvalidRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    IdempotencyMismatch: HTTPStatus.UNPROCESSABLE_ENTITY,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageCorrupt: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageFull: HTTPStatus.INSUFFICIENT_STORAGE,
}
CODE_STATUSES: dict[str, int] = {
    "invalid_cursor": HTTPStatus.BAD_REQUEST,
    "invalid_idempotency_key": HTTPStatus.BAD_REQUEST,
}
"""Codes whose status is not that of their class."""
RETRY_AFTER_SECONDS: dict[int, int] = {HTTPStatus.SERVICE_UNAVAILABLE: 2, HTTPStatus.INSUFFICIENT_STORAGE: 60}

FRAMEWORK_FIXES = {
    HTTPStatus.BAD_REQUEST: "Send a request that follows the API description at /openapi.json.",
    HTTPStatus.NOT_FOUND: "Check the path; all of them are listed at /openapi.json.",
    HTTPStatus.METHOD_NOT_ALLOWED: "Use one of the methods in the Allow header.",
    HTTPStatus.REQUEST_TIMEOUT: "Send the body faster, or in smaller parts.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: TooLarge.fix,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "Send the body as it is, with the Content-Type that /openapi.json names.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Send it again in a few seconds; a resumable upload goes on from where HEAD says.",
}

log = structlog.get_logger(__name__)


class PlaceView(BaseModel):
    """One thing wrong with a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    pointer: str
    """Where: a JSON pointer into the body, or `query:<name>`, `header:<name>`."""
    detail: str
    """What is wrong there, and what is expected."""


class ProblemView(BaseModel):
    """Why a request failed (RFC 9457)."""

    model_config = ConfigDict(use_attribute_docstrings=True, title="Problem")

    type: str = Field(examples=["urn:pare:problem:not_found"])
    """A URI that names this kind of problem."""
    title: str = Field(examples=["Not found"])
    """The kind of problem in words."""
    status: int = Field(examples=[404])
    """The HTTP status."""
    detail: str = Field(examples=["there is no job job_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
    """What happened this time, with the values."""
    code: str = Field(examples=["not_found"])
    """A stable name of this kind of problem, for programs to compare."""
    fix: str
    """What to do about it."""
    retryable: bool
    """Whether the same request can succeed later."""
    request_id: str
    """Quote this when reporting the problem; the service's log carries it."""
    errors: list[PlaceView] = Field(default=[])
    """Every place of the request that is wrong; left out where there is none."""
    violated_policies: list[str] = Field(default=[], alias="violated-policies")
    """Limits that were met: requests, queued-jobs, stored-bytes; left out where there is none."""


def install(app: FastAPI) -> None:
    """Make the application answer every error with a problem."""
    app.add_exception_handler(PareError, _answer_ours)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_framework)


def answer_unexpected(error: Exception) -> Response:
    """Return the 500 for an error nobody expected; what it was stands in the log alone."""
    log.exception("unexpected error", error=type(error).__name__, exc_info=error)
    return make_problem(
        HTTPStatus.INTERNAL_SERVER_ERROR, PareError.code, "Something went wrong in Pare.", PareError.fix
    )


def make_problem(
    status: int,
    code: str,
    detail: str,
    fix: str,
    *,
    retryable: bool = False,
    errors: list[Problem] | None = None,
    policies: list[str] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return the response."""
    body: dict[str, Any] = {
        "type": TYPES.get(code, f"urn:pare:problem:{code}"),
        "title": code.replace("_", " ").capitalize(),
        "status": int(status),
        "detail": detail,
        "code": code,
        "fix": fix,
        "retryable": retryable,
        "request_id": current_request_id() or "",
    }
    if errors:
        body["errors"] = [{"pointer": error.pointer, "detail": error.detail} for error in errors[:MAX_ERRORS]]
    if policies:
        body["violated-policies"] = policies
    # ASCII, because a client may have sent us half a character that UTF-8 cannot carry.
    content = json.dumps(body, ensure_ascii=True, allow_nan=False)
    return Response(content, status_code=int(status), media_type=MEDIA_TYPE, headers=headers)


def status_of(error: PareError) -> int:
    """Return the HTTP status of one of our errors."""
    if error.code in CODE_STATUSES:
        return CODE_STATUSES[error.code]
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def answer_error(error: PareError, *, unread_body: bool = False) -> Response:
    """Return the answer for one of our errors; with `unread_body`, the connection ends with it."""
    status = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return answer_unexpected(error)
    headers = _describe_headers(error)
    if status >= 500:
        log.warning("request failed", code=error.code, detail=error.detail, exc_info=error)
        if error.retryable:
            headers["Retry-After"] = str(RETRY_AFTER_SECONDS[status])
    if isinstance(error, OffsetMismatch) and error.offset is not None:
        headers["Upload-Offset"] = str(error.offset)
    if isinstance(error, VersionUnsupported):
        headers["Tus-Version"] = TUS_VERSION
    if isinstance(error, TooLarge) or unread_body:
        headers["Connection"] = "close"  # the rest of the body is not worth reading
    places = error.errors if isinstance(error, InvalidRequest) else None
    return make_problem(
        status,
        error.code,
        error.detail,
        error.fix,
        retryable=error.retryable,
        errors=places,
        policies=[error.policy] if isinstance(error, QuotaExceeded) else None,
        headers=headers,
    )


def _describe_headers(error: PareError) -> dict[str, str]:
    """Return the headers that say the same as the error in words."""
    match error:
        case NotAuthenticated():
            sent = "" if error.code == "key_missing" else ', error="invalid_token"'  # RFC 6750
            return {"WWW-Authenticate": f'Bearer realm="pare"{sent}'}
        case Forbidden():
            return {"WWW-Authenticate": f'Bearer realm="pare", error="insufficient_scope", scope="{error.scope}"'}
        case TooManyRequests(retry_after_seconds=float(seconds)):
            return {"Retry-After": str(max(1, math.ceil(seconds)))}
        case StillRunning():
            return {"Retry-After": "1"}
        case RangeNotSatisfiable():
            return {"Content-Range": f"bytes */{error.size_bytes}", "Accept-Ranges": "bytes"}
    return {}


def _answer_ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, PareError)
    return answer_error(error)


def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if all(item["loc"][0] == "path" for item in found):
        return make_problem(
            HTTPStatus.NOT_FOUND, NotFound.code, f"there is nothing at {request.url.path}", NotFound.fix
        )
    if any(item["type"] == "json_invalid" for item in found):
        place = found[0]
        detail = f"the body is not JSON: {place['ctx']['error']} at character {place['loc'][-1]}"
        return make_problem(HTTPStatus.BAD_REQUEST, "invalid_json", detail, "Send a JSON object.")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if any(item["loc"] == ("body",) for item in found) and media_type and not media_type.endswith("json"):
        # The framework did not read it, and would say that bytes are no object.
        detail = f"the body was sent as {media_type[:100]}, and only application/json is read"
        fix = "Send the header Content-Type: application/json (curl: -H 'Content-Type: application/json')."
        return make_problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, UnsupportedFormat.code, detail, fix)
    errors = list(dict.fromkeys(Problem(_locate(item, error.body), _explain(item)) for item in found))
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return make_problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        InvalidRequest.code,
        f"{first.pointer or '/'}: {first.detail}{more}",
        InvalidRequest.fix,
        errors=errors,
    )


def _answer_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(sorted(list_methods(request.app, request.scope["path"])))
        headers["Allow"] = allowed
        detail = f"{request.method} is not allowed on {request.url.path}; allowed: {allowed}"
    elif status is HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {request.url.path}"
    elif status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers["Connection"] = "close"  # else what is left of the body goes on coming
        detail = error.detail
    elif status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers |= {"Connection": "close", "Retry-After": str(RETRY_AFTER_SECONDS[status])}
        detail = error.detail
    else:
        detail = error.detail
    codes = {
        HTTPStatus.NOT_FOUND: NotFound.code,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: TooLarge.code,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: UnsupportedFormat.code,
        HTTPStatus.SERVICE_UNAVAILABLE: Unavailable.code,
    }
    code = codes.get(status) or status.phrase.lower().replace(" ", "_").replace("-", "_")
    fix, retryable = FRAMEWORK_FIXES.get(status, PareError.fix), status is HTTPStatus.SERVICE_UNAVAILABLE
    return make_problem(status, code, detail, fix, retryable=retryable, headers=headers)


def list_methods(app: FastAPI, path: str) -> set[str]:
    """Return the methods that a path answers. The framework's own Allow header knows one route only."""
    methods: set[str] = set()
    for template, operations in app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path):
            methods |= {name.upper() for name in operations}
    return methods | {"HEAD"} if "GET" in methods else methods or {"GET", "HEAD"}


def _locate(item: dict[str, Any], body: Any) -> str:
    where, *parts = item["loc"]
    if where != "body":
        return f"{where}:{parts[-1]}" if parts else str(where)
    pointer, here = "", body
    for position, part in enumerate(parts):
        inside = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if inside or (isinstance(here, dict) and part in here):
            here = here[part]
        elif position < len(parts) - 1 or item["type"] != "missing":
            continue  # the name of a member of a union, or "[key]", which the body does not contain
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer


def _explain(item: dict[str, Any]) -> str:
    # Pydantic's own words for these are about pydantic.
    match item["type"]:
        case "extra_forbidden":
            return "there is no such field here; /openapi.json and GET /v1/techniques list those there are"
        case "missing":
            return "this field is required"
        case "union_tag_not_found":
            return f"the field {item['ctx']['discriminator']} is required: it says which kind this is"
        case "union_tag_invalid":
            return f"there is no {item['ctx']['tag']!r}; known are {item['ctx']['expected_tags']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "this must be an object: {...}"
        case "tuple_type" | "list_type":
            return "this must be a list: [...]"
    return str(item["msg"]).removeprefix("Value error, ")
