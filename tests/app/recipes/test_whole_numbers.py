"""Every integer of a request: 2.0 is one, as the schema that clients read says, and 2.5 is none."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

import app.main  # noqa: F401 - defines the requests of every route
from app.recipes.base import Spec
from app.recipes.recipe import Recipe

OF_A_LIST = ("too_short", "too_long", "value_error")
"""Errors about a list's length or order, not about a number in it."""


def all_specs(of: type[Spec] = Spec) -> Iterator[type[Spec]]:
    for each in of.__subclasses__():
        yield each
        yield from all_specs(each)


def integers_of(spec: type[Spec]) -> Iterator[tuple[str, int, bool]]:
    """Yield the integer fields, a value that each takes, and whether it is a list of such."""
    for name, field in spec.model_json_schema().get("properties", {}).items():
        for choice in field.get("anyOf", [field]):
            is_list = choice.get("type") == "array"
            inner = choice.get("items", {}) if is_list else choice
            if inner.get("type") == "integer":
                yield name, inner.get("minimum", (inner.get("enum") or [1])[0]), is_list


def errors_at(spec: type[Spec], name: str, value: Any) -> list[str]:
    try:
        spec.model_validate({name: value})
    except ValidationError as error:
        return [f"{each['type']} {value}" for each in error.errors() if each["loc"][:1] == (name,)]
    return []


def test_what_the_schema_calls_an_integer_is_taken_whole_and_not_otherwise() -> None:
    wrong = {}
    names = set()
    for spec in dict.fromkeys(all_specs()):
        for name, value, is_list in integers_of(spec):
            names.add(f"{spec.__name__}.{name}")
            given = [[each] if is_list else each for each in (value, float(value), value + 0.5)]
            integer, whole, fraction = (
                [each for each in errors_at(spec, name, each) if not each.startswith(OF_A_LIST)] for each in given
            )
            if integer or whole or not fraction:
                wrong[f"{spec.__name__}.{name}"] = integer + whole + fraction
    assert wrong == {}
    assert {"Train.max_steps", "QuantizeInt4.bits", "Target.num_runs", "QuotaRequest.queued_jobs"} <= names


def test_a_whole_number_is_kept_as_an_integer() -> None:
    step = {"kind": "quantize_int4", "bits": 2, "group_size": 64}
    expected = Recipe.model_validate({"steps": [step], "seed": 7})
    recipe = Recipe.model_validate({"steps": [{**step, "bits": 2.0, "group_size": 64.0}], "seed": 7.0})
    assert recipe == expected
    assert recipe.model_dump_json() == expected.model_dump_json()
