"""The API description: every answer of every operation, the errors included."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

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
    {"name": "workers", "description": "The processes that run jobs."},
    {"name": "health", "description": "Whether the service works."},
]

EVERYWHERE = (500, 503)
REQUEST_ID = {
    "description": "Names this request in the service's log; a UUID sent in this header is taken over.",
    "schema": {"type": "string"},
}
LOCATION = {"description": "URL path of the new thing.", "schema": {"type": "string"}}
RETRY_AFTER = {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}
ALLOW = {"description": "The methods this path answers.", "schema": {"type": "string"}}

CREATED: dict[str, Any] = {"headers": {"Location": LOCATION}}

MEANINGS = {
    400: "The request cannot be read, or its cursor or Idempotency-Key is not valid.",
    404: "There is no such thing.",
    409: "The state of the thing forbids this.",
    410: "The time of the thing is over.",
    412: "The file, or the version of the protocol, is not the one the request expects.",
    413: "The body is larger than the limit.",
    415: "The body is in a format, or an encoding, that is not taken.",
    416: "The range lies outside the file.",
    422: "The request does not fit; `errors` names every place.",
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
    if status in (503, 507):
        described["headers"] = {"Retry-After": RETRY_AFTER}
    return described


def describe_api(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return the function that makes the description, once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=DESCRIPTION.strip(), routes=app.routes, tags=TAGS
            )
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    _complete(path, method, operation)
            components = schema["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
            problem = ProblemView.model_json_schema(ref_template="#/components/schemas/{model}")
            components.update(problem.pop("$defs"))
            components["Problem"] = problem
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
    if ("requestBody" in operation or method == "post") and "415" not in responses:
        statuses.append(415)
    responses.update({str(status): _describe_problem(status) for status in statuses})
    for status, response in responses.items():
        response.setdefault("headers", {})["X-Request-ID"] = REQUEST_ID
        if "description" not in response:
            response["description"] = HTTPStatus(int(status)).phrase
    operation["responses"] = dict(sorted(responses.items()))
