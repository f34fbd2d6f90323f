"""Damaged archives: whatever changes at random, an archive is opened or rejected, and nothing else happens."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

from tests.engine.programs.hostile import (
    MODEL,
    Members,
    write_members,
)
from worker.engine.errors import ModelRejected
from worker.engine.programs.intake import open_program


def test_mutated_archives_are_only_ever_rejected(valid: Path, tmp_path: Path) -> None:
    raw, path = valid.read_bytes(), tmp_path / "a.pt2"
    generator = random.Random(7)
    rejected = 0
    for _ in range(150):
        data = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            open_program(path, tmp_path)
        except ModelRejected:
            rejected += 1
    assert rejected > 100


def test_mutated_json_is_only_ever_rejected(members: Members, tmp_path: Path) -> None:
    """Changes inside models/model.json with a right checksum: they reach the grammar and torch."""
    generator = random.Random(11)
    tokens = [b"0", b"1", b"-1", b"9999999", b"null", b"true", b'"x"', b"[]", b"{}", b"1.5", b'"relu"', b'"as_none"']
    accepted = 0
    for _ in range(100):
        text = bytearray(members[MODEL])
        place = generator.randrange(len(text))
        end = place + generator.randint(0, 6)
        text[place:end] = generator.choice(tokens)
        try:
            open_program(write_members(tmp_path / "a.pt2", {**members, MODEL: bytes(text)}), tmp_path)
            accepted += 1
        except ModelRejected:
            pass
    assert accepted < 60


def test_mutated_values_are_only_ever_rejected(members: Members, tmp_path: Path) -> None:
    """Replace whole values of models/model.json by others of the document: well-formed, but wrong."""
    generator = random.Random(13)
    document = json.loads(members[MODEL])["graph_module"]["graph"]
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            collect(value[key])

    collect(document)
    for _ in range(80):
        (owner, key), (other, source) = generator.choice(places), generator.choice(places)
        before = owner[key]
        owner[key] = other[source]
        try:
            text = json.dumps({**json.loads(members[MODEL]), "graph_module": {
                **json.loads(members[MODEL])["graph_module"], "graph": document}})  # fmt: skip
        except (ValueError, RecursionError):
            continue
        finally:
            owner[key] = before
        with contextlib.suppress(ModelRejected):
            open_program(write_members(tmp_path / "a.pt2", {**members, MODEL: text.encode()}), tmp_path)
