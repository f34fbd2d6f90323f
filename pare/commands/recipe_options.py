"""Recipes and name=value pairs from the command line."""

import json
import sys
from pathlib import Path
from typing import Any

from pare.errors import UsageError
from pare.recipes import RecipeLike


def read_recipe(recipe: str | None, steps: list[str]) -> RecipeLike:
    """Return the recipe of --recipe (a file, or - for standard input) or the steps of --step."""
    if (recipe is None) == (not steps):
        raise UsageError(
            "give either --recipe or --step", fix="--recipe recipe.json, or --step prune_structured:ratio=0.5"
        )
    if recipe is None:
        return [parse_step(step) for step in steps]
    content = _read_json(recipe, "recipe")
    if not isinstance(content, dict | list):
        raise UsageError(
            f"the recipe {recipe} is a JSON {type(content).__name__}", fix='Give {"steps": [...]} or [...].'
        )
    return content


def read_object(name: str) -> dict[str, Any]:
    """Return the JSON object in a file, or on standard input where the name is -."""
    content = _read_json(name, "file")
    if not isinstance(content, dict):
        raise UsageError(f"{name} is a JSON {type(content).__name__}", fix="Give a JSON object.")
    return content


def _read_json(name: str, noun: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the {noun} {name}: {error}", fix="It is a JSON file.") from error


def parse_step(text: str) -> dict[str, Any]:
    """Read kind:name=value,name=value; values are JSON where they can be, else text."""
    kind, _, rest = text.partition(":")
    return {"kind": kind, **{name: read_value(value) for name, value in split_pairs(_split(rest), "--step").items()}}


def _split(text: str) -> list[str]:
    """Split at the commas that are not inside of a JSON list or object."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def split_pairs(pairs: list[str], option: str) -> dict[str, str]:
    """Read name=value pairs."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not pair:
            continue
        if not sign or not name:
            raise UsageError(f"{option}: {pair!r} is not name=value")
        found[name] = value
    return found


def read_value(text: str) -> Any:
    """Return the JSON value that a text is, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
