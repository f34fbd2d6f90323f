"""Building altered archives from a valid one, and the proof that they are refused."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.engine.errors import ModelRejected
from worker.engine.programs.intake import open_program

ROOT = "archive"
Members = dict[str, bytes]


def read_members(path: Path) -> dict[str, bytes]:
    """Return the members of an archive, without its top folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_members(path: Path, members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{ROOT}/{name}", content)
    return path


def alter_json(members: dict[str, bytes], name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    """Return the members with one JSON member changed in place by `change`."""
    value = json.loads(members[name])
    change(value)
    return {**members, name: json.dumps(value).encode()}


MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def strings_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all strings and keys in a JSON value; a key's path ends with ("key", key)."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, str):
        found.append(path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += strings_of(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            found.append((*path, ("key", key)))
            found += strings_of(item, (*path, key))
    return found


def replace_at(value: Any, path: tuple[Any, ...], new: str) -> None:
    """Replace the string or key at a path, in place."""
    for step in path[:-1]:
        value = value[step]
    last = path[-1]
    if isinstance(last, tuple):
        value[new] = value.pop(last[1])
    else:
        value[last] = new


def refuse(path: Path, *codes: str) -> ModelRejected:
    """Open an archive, which must be rejected, with one of the codes if any are given."""
    with pytest.raises(ModelRejected) as caught:
        open_program(path, path.parent)
    if codes:
        assert caught.value.code in codes, (caught.value.code, caught.value.detail)
    assert caught.value.detail
    assert caught.value.fix
    return caught.value


class Payload:
    """Creates the marker file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


def evil_pickle(marker: Path) -> bytes:
    """Return a pickle that creates the marker file."""
    return pickle.dumps(Payload(marker))
