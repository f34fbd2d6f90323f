"""Links of the API description: what can be done next with the thing that an answer names.

Nobody writes them down: the operation whose path is `/v1/jobs/{job_id}` says what a job looks like, so every answer
that contains one can be followed by every operation that has a `job_id` in its path.
"""

from typing import Any

METHODS = ("get", "put", "post", "patch", "delete")
_REFERENCE = "#/components/schemas/"

Operations = list[tuple[str, str, dict[str, Any]]]
"""Path, method and operation."""


def add_links(schema: dict[str, Any]) -> None:
    """Give every answer that names things its links to the operations on them."""
    operations = [
        (path, method, items[method])
        for path, items in schema["paths"].items()
        for method in METHODS
        if method in items
    ]
    views = schema["components"]["schemas"]
    known = _find_things(operations, views)
    for path, _, operation in operations:
        own = _list_parameters(path)
        for status, response in operation["responses"].items():
            told = {} if int(status) >= 300 else _find_ids(_answer_of(response), views, known)
            links = {
                following["operationId"]: {"operationId": following["operationId"], "parameters": values}
                for target, _, following in operations
                if following is not operation and (values := _bind(_list_parameters(target), told, own))
            }
            if links:
                response["links"] = links


def _find_things(operations: Operations, views: dict[str, Any]) -> dict[str, str]:
    """Return view -> the parameter that names its thing."""
    known = {}
    for path, method, operation in operations:
        collection, _, last = path.rpartition("/")
        if method != "get" or not last.startswith("{"):
            continue
        parameter = last[1:-1]
        shown = _view_of(_answer_of(operation["responses"]["200"]))
        # Where the thing itself is bytes, a view with its name describes it.
        described = shown or f"{parameter.removesuffix('_id').title()}View"
        # What is made by a POST to the collection may show more than what is read later: a secret, for example.
        made = [
            _view_of(_answer_of(response))
            for other, other_method, another in operations
            if (other, other_method) == (collection, "post")
            for status, response in another["responses"].items()
            if status == "201"
        ]
        for name in (described, *made):
            if name is not None and "id" in views[name]["properties"]:
                known[name] = parameter
    return known


def _find_ids(answer: dict[str, Any], views: dict[str, Any], known: dict[str, str]) -> dict[str, str]:
    """Return parameter -> where in an answer the id stands that it takes."""
    name = _view_of(answer)
    if name is None:
        return {}
    if name in known:
        return {known[name]: "/id"}
    found = {}
    for field, described in views[name].get("properties", {}).items():
        one, several = _view_of(described), _view_of(described.get("items", {}))
        if one in known:
            found[known[one]] = f"/{field}/id"
        if several in known:
            found[known[several]] = f"/{field}/0/id"
    return found


def _bind(wanted: list[str], told: dict[str, str], own: list[str]) -> dict[str, str]:
    """Return where the parameters of an operation come from; nothing, unless the answer tells at least the last."""
    if not wanted or wanted[-1] not in told or not set(wanted) <= {*told, *own}:
        return {}
    return {name: f"$response.body#{told[name]}" if name in told else f"$request.path.{name}" for name in wanted}


def _answer_of(response: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = response.get("content", {}).get("application/json", {}).get("schema", {})
    return found


def _view_of(described: dict[str, Any]) -> str | None:
    reference: str = described.get("$ref", "")
    return reference.removeprefix(_REFERENCE) or None


def _list_parameters(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]
