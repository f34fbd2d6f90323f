"""The API description: every answer of every operation, the errors included."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.guard import PUBLIC_PATHS, required_scope
from app.api.links import add_links
from app.api.problems import MEDIA_TYPE, ProblemView

DESCRIPTION = """
Makes trained PyTorch models smaller and faster, and proves it: upload a model and data, post a recipe, follow the job,
download the artifacts with the measured before and after.

Every error is an RFC 9457 problem (`application/problem+json`). Every GET answers HEAD as well, with the same headers
and no body. Lists are newest first. Times are RFC 3339 in UTC. Ids are opaque.
"""

TAGS = [
    {"name": "models", "description": "Uploaded, immutable programs."},
    {"name": "datasets", "description": "Uploaded, immutable examples."},
    {"name": "uploads", "description": "Files on their way in, resumable: the tus protocol, version 1.0.0."},
    {"name": "techniques", "description": "What can stand in a recipe."},
    {"name": "jobs", "description": "Requests to run a recipe on a model."},
    {"name": "artifacts", "description": "The files jobs made."},
    {"name": "webhooks", "description": "Endpoints of yours that hear what happens to jobs."},
    {"name": "access", "description": "Keys, and what one may do with them."},
    {"name": "workers", "description": "The processes that run jobs."},
    {"name": "health", "description": "Whether the service works."},
]

SCHEME = "key"
EVERYWHERE = (500, 503)
REQUEST_ID = {
    "description": "Names this request, and the job that it submits, in the service's logs. One that is sent is taken "
    "over if it has 8 to 64 letters, digits, `.`, `_` or `-`.",
    "schema": {"type": "string"},
}
LOCATION = {"description": "URL path of the new thing.", "schema": {"type": "string"}}
RETRY_AFTER = {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}
RATE_LIMIT = {
    "description": '`"requests";r=<left>;t=<seconds to the next window>`, on every answer where there is a limit.',
    "schema": {"type": "string"},
}
RATE_LIMIT_POLICY = {
    "description": '`"requests";q=<limit>;w=<seconds of the window>`, on every answer where there is a limit.',
    "schema": {"type": "string"},
}
AUTHENTICATE = {"description": "How to authenticate (RFC 6750).", "schema": {"type": "string"}}
ALLOW = {"description": "The methods this path answers.", "schema": {"type": "string"}}

CREATED: dict[str, Any] = {"headers": {"Location": LOCATION}}

MEANINGS = {
    400: "The request cannot be read, or its cursor or Idempotency-Key is not valid.",
    401: "No key was sent, or not a valid one.",
    403: "The key lacks the scope that this needs.",
    404: "There is no such thing.",
    408: "The body came too slowly, or not at all.",
    409: "The state of the thing forbids this.",
    410: "The time of the thing is over.",
    412: "The file, or the version of the protocol, is not the one the request expects.",
    413: "The body is larger than the limit.",
    415: "The body is in a format, or an encoding, that is not taken.",
    416: "The range lies outside the file.",
    422: "The request does not fit; `errors` names every place.",
    429: "More than this owner may have or send.",
    460: "The bytes are not those of the checksum; they were dropped.",
    500: "Something went wrong in Pare.",
    503: "A part the service depends on does not answer.",
    507: "There is no space left in storage.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an operation for its errors."""
    return {status: _describe_problem(status) for status in statuses}


def _describe_problem(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": MEANINGS[status],
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status in (429, 503, 507):
        described["headers"] = {"Retry-After": RETRY_AFTER}
    if status == 429:
        described["headers"] |= {"RateLimit": RATE_LIMIT, "RateLimit-Policy": RATE_LIMIT_POLICY}
    if status in (401, 403):
        described["headers"] = {"WWW-Authenticate": AUTHENTICATE}
    return described


def describe_api(app: FastAPI, *, keys: bool) -> Callable[[], dict[str, Any]]:
    """Return the function that makes the description, once. `keys`: they are in force."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=DESCRIPTION.strip(), routes=app.routes, tags=TAGS
            )
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    _complete(path, method, operation)
                    if keys and path not in PUBLIC_PATHS:
                        _require_key(path, method, operation)
            components = schema["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
            problem = ProblemView.model_json_schema(ref_template="#/components/schemas/{model}")
            components.update(problem.pop("$defs"))
            components["Problem"] = problem
            add_links(schema)
            if keys:
                schema["components"]["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    generated = responses.get("422", {}).get("content", {})
    if "application/json" in generated:
        del responses["422"]  # the framework's own; ours is in problem+json
    statuses = [status for status in EVERYWHERE if str(status) not in responses]
    if "{" in path and "404" not in responses:
        statuses.append(404)
    if path not in PUBLIC_PATHS and "429" not in responses:
        statuses.append(429)
    if ("requestBody" in operation or method == "post") and "415" not in responses:
        statuses.append(415)
    if "requestBody" in operation:
        statuses.append(408)
    responses.update({str(status): _describe_problem(status) for status in statuses})
    for status, response in responses.items():
        response.setdefault("headers", {})["X-Request-ID"] = REQUEST_ID
        if "description" not in response:
            response["description"] = HTTPStatus(int(status)).phrase
    operation["responses"] = dict(sorted(responses.items()))


def _require_key(path: str, method: str, operation: dict[str, Any]) -> None:
    scope = required_scope(method.upper(), path)
    # OpenAPI 3.1: the list may name the roles that the operation needs.
    operation["security"] = [{SCHEME: [scope] if scope else []}]
    for status in (401, 403):
        described = operation["responses"].setdefault(str(status), _describe_problem(status))
        described["headers"]["X-Request-ID"] = REQUEST_ID
    operation["responses"] = dict(sorted(operation["responses"].items()))
