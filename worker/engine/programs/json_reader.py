"""Strict JSON: no duplicate keys, no NaN or infinities, bounded number of values; and checked access to them."""

import json
import math
from typing import Any, NoReturn

from worker.engine.programs.rejections import reject, shown

MAX_VALUES = 8_000_000
"""An empty list takes three bytes of a text and sixty of memory."""


def _bad(where: str, detail: str) -> NoReturn:
    reject("bad_structure", f"{where}: {detail}")


def parse_json(raw: bytes | str, where: str) -> Any:
    """Return the value of a JSON text that means the same to every parser."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _bad(where, f"the key {shown(twice)} appears twice")
        return mapping

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            _bad(where, f"the number {shown(text)} is not finite")
        return value

    def constant(text: str) -> NoReturn:
        _bad(where, f"the constant {text} is not JSON")

    def small(text: str) -> int:
        if len(text) > 20:
            _bad(where, f"the integer {shown(text)} does not fit into 64 bits")
        return int(text)

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        if (count := text.count(",") + text.count("[") + text.count("{")) > MAX_VALUES:
            _bad(where, f"up to {count} values; at most {MAX_VALUES} are taken")
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=constant, parse_int=small)
    except UnicodeDecodeError:
        _bad(where, "the text is not UTF-8")
    except json.JSONDecodeError as error:
        _bad(where, f"not JSON: {error.msg} at position {error.pos}")
    except RecursionError:
        _bad(where, "nested too deeply")
    return value


def record(value: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an object that has all required keys and no unknown ones."""
    if not isinstance(value, dict):
        _bad(where, f"expected an object, found {shown(value)}")
    for key in value:
        if key not in required and key not in optional:
            _bad(where, f"unknown field {shown(key)}")
    for key in required:
        if key not in value:
            _bad(where, f"the field {key!r} is missing")
    return value


def union(value: Any, where: str, kinds: tuple[str, ...]) -> tuple[str, Any]:
    """Return the single (kind, value) of a tagged union, whose kind must be one of `kinds`."""
    if not isinstance(value, dict) or len(value) != 1:
        _bad(where, f"expected an object with one field, found {shown(value)}")
    kind, content = next(iter(value.items()))
    if kind not in kinds:
        _bad(where, f"{shown(kind)} is not one of {', '.join(kinds)}")
    return kind, content


def items(value: Any, where: str, max_length: int = 1_000_000) -> list[Any]:
    """Return a bounded array."""
    if not isinstance(value, list) or len(value) > max_length:
        _bad(where, f"expected an array of at most {max_length} items, found {shown(value)}")
    return value


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return an object with any keys."""
    if not isinstance(value, dict):
        _bad(where, f"expected an object, found {shown(value)}")
    return value


def integer(value: Any, where: str, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    """Return an integer (not a boolean) within bounds."""
    if type(value) is not int or not low <= value <= high:
        _bad(where, f"expected an integer from {low} to {high}, found {shown(value)}")
    return value


def boolean(value: Any, where: str) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        _bad(where, f"expected true or false, found {shown(value)}")
    return value


def number(value: Any, where: str) -> float | str:
    """Return a float as torch writes it: a JSON number, or the words Infinity, -Infinity and NaN."""
    if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN"):
        return value
    if type(value) not in (int, float):
        _bad(where, f"expected a number, found {shown(value)}")
    return float(value)


def text(value: Any, where: str, max_length: int = 4096) -> str:
    """Return a bounded string."""
    if not isinstance(value, str) or len(value) > max_length:
        _bad(where, f"expected a string of at most {max_length} characters, found {shown(value)}")
    return value
