"""Datasets from strangers: what is accepted is read exactly, what is not is refused with a code, and nothing runs."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from app.recipes.plan import DatasetFormat
from tests.engine.training.test_images import moved
from worker.engine.errors import DatasetRejected
from worker.engine.training.datasets import check_dataset, read_columns

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
]


@st.composite
def tables(draw: st.DrawFn) -> dict[str, np.ndarray]:
    rows = draw(st.integers(1, 5))
    names = draw(
        st.lists(st.sampled_from(["x", "y", "image", "label 2", "ids_3"]), min_size=1, max_size=4, unique=True)
    )
    return {
        name: draw(hnp.arrays(draw(st.sampled_from(DTYPES)), (rows, *draw(st.lists(st.integers(1, 4), max_size=3)))))
        for name in names
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), kind=st.sampled_from(["stored", "deflated", "fortran", "safetensors"]))
def test_every_column_is_read_back_exactly(tmp_path: Path, table: dict[str, np.ndarray], kind: str) -> None:
    path = tmp_path / "data"
    for old in tmp_path.iterdir():
        old.unlink()
    if kind == "safetensors":
        save_file(table, str(path))
    elif kind == "deflated":
        np.savez_compressed(path, **table)  # type: ignore[arg-type]
    else:
        ordered = {name: np.asfortranarray(array) if kind == "fortran" else array for name, array in table.items()}
        np.savez(path, **ordered)  # type: ignore[arg-type]
    if kind != "safetensors":
        path.with_suffix(".npz").rename(path)
    format: DatasetFormat = "safetensors" if kind == "safetensors" else "npz"

    facts = check_dataset(path, format)

    assert facts.num_rows == len(next(iter(table.values())))
    assert {c.name: (c.dtype, c.shape) for c in facts.columns} == {
        name: (array.dtype.name, array.shape[1:]) for name, array in table.items()
    }
    for column in read_columns(path, format):
        rows, expected = column.open_rows(path, tmp_path), table[column.name]
        assert (rows.shape, rows.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(rows[:], expected)
        some = np.random.default_rng(0).permutation(len(expected)).repeat(2)
        np.testing.assert_array_equal(rows[some], expected[some])


def npy(header: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    raw = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(raw)) + raw + data


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def good() -> bytes:
    return npz(x=npy(header(), bytes(8)))


def saved(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Bomb:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch marker",)


def pickled_npz() -> bytes:
    return npz(x=npy(header(descr="'|O'"), pickle.dumps(Bomb())))


def duplicate_members() -> bytes:
    return npz(x=npy(header(), bytes(8)), y=npy(header(), bytes(8))).replace(b"y.npy", b"x.npy")


def deflate_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        size = 300 * 1024 * 1024
        member.write(npy(header(descr="'|u1'", shape=f"({size},)"), b""))
        for _ in range(300):
            member.write(bytes(1024 * 1024))
    return buffer.getvalue()


def lying_size() -> bytes:
    """A deflated member that unpacks to more than the directory declares."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(header(), bytes(8)) + bytes(100_000))
    raw = bytearray(buffer.getvalue())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = struct.pack("<L", len(npy(header(), bytes(8))))
    return bytes(raw)


def flipped_bit() -> bytes:
    raw = bytearray(saved(x=np.arange(100.0)))
    raw[raw.index(b"PK\x01\x02") - 17] ^= 1
    return bytes(raw)


def overlapping() -> bytes:
    """Two directory entries for the same bytes, as in Fifield's bomb."""
    raw = bytearray(npz(x=npy(header(), bytes(8))))
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    entry = bytes(raw[start:end])
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, 2 * len(entry), start, 0)
    return bytes(raw[:start]) + entry + entry + tail


def renamed_inside() -> bytes:
    raw = bytearray(good())
    raw[30:35] = b"z.npy"
    return bytes(raw)


NPZ_CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "dataset_not_npz"),
    "not a zip": (lambda: b"hello" * 100, "dataset_not_npz"),
    "a bare npy": (lambda: npy(header(), bytes(8)), "dataset_not_npz"),
    "a bare pickle": (lambda: pickle.dumps(Bomb()) + bytes(30), "dataset_not_npz"),
    "bytes before the zip": (lambda: b"GIF89a" + good(), "dataset_not_npz"),
    "another file, and a zip that counts it": (lambda: moved(good(), b"GIF89a"), "dataset_not_npz"),
    "bytes after the zip": (lambda: good() + b"more", "dataset_not_npz"),
    "truncated": (lambda: good()[:-30], "dataset_not_npz"),
    "no members": (lambda: npz(), "dataset_empty"),
    "member without .npy": (lambda: good().replace(b"x.npy", b"x.pkl"), "dataset_not_npz"),
    "path as a name": (lambda: npz(**{"../x": npy(header(), bytes(8))}), "dataset_bad_name"),
    "control character in a name": (lambda: npz(**{"a\nb": npy(header(), bytes(8))}), "dataset_bad_name"),
    "very long name": (lambda: npz(**{"x" * 300: npy(header(), bytes(8))}), "dataset_bad_name"),
    "too many members": (lambda: npz(**{f"c{i}": b"" for i in range(1001)}), "dataset_too_many_columns"),
    "duplicate members": (duplicate_members, "dataset_duplicate_column"),
    "overlapping members": (overlapping, "dataset_not_npz"),
    "other name in the local header": (renamed_inside, "dataset_not_npz"),
    "deflate bomb": (deflate_bomb, "dataset_too_large_unpacked"),
    "unpacks to more than declared": (lying_size, "dataset_corrupt"),
    "a flipped bit": (flipped_bit, "dataset_corrupt"),
    "object dtype": (pickled_npz, "dataset_bad_dtype"),
    "object array by numpy": (lambda: saved(x=np.array([Bomb()], dtype=object)), "dataset_bad_dtype"),
    "strings": (lambda: saved(x=np.array(["a", "b"])), "dataset_bad_dtype"),
    "dates": (lambda: saved(x=np.array(["2026-01-01"], dtype="datetime64[D]")), "dataset_bad_dtype"),
    "complex numbers": (lambda: saved(x=np.zeros(2, complex)), "dataset_bad_dtype"),
    "big endian": (lambda: saved(x=np.zeros(2, ">f4")), "dataset_bad_dtype"),
    "structured dtype": (lambda: saved(x=np.zeros(2, [("a", "f4")])), "dataset_bad_dtype"),
    "no magic": (lambda: npz(x=bytes(100)), "dataset_bad_header"),
    "unknown version": (lambda: npz(x=npy(header(), bytes(8), b"\x09\x00")), "dataset_bad_header"),
    "code in the header": (
        lambda: npz(x=npy(header(shape="(__import__('os').system('touch marker'),)"), bytes(8))),
        "dataset_bad_header",
    ),
    "repeated header key": (
        lambda: npz(x=npy("{'descr': '<f4', 'shape': (2,), 'shape': (2,), }\n", bytes(8))), "dataset_bad_header",
    ),
    "additional header key": (
        lambda: npz(x=npy(header().replace(", }", ", 'more': 1}"), bytes(8))), "dataset_bad_header",
    ),
    "negative size": (lambda: npz(x=npy(header(shape="(-2,)"), bytes(8))), "dataset_bad_header"),
    "deep nesting": (lambda: npz(x=npy(header(shape="(" * 2000 + ")" * 2000), bytes(8))), "dataset_bad_header"),
    "huge header": (lambda: npz(x=npy(header() + " " * 40_000, bytes(8))), "dataset_bad_header"),
    "shape that overflows": (lambda: npz(x=npy(header(shape=f"({2**32}, {2**32})"), bytes(8))), "dataset_bad_size"),
    "shape larger than the data": (lambda: npz(x=npy(header(shape="(3,)"), bytes(8))), "dataset_bad_size"),
    "shape smaller than the data": (lambda: npz(x=npy(header(shape="(1,)"), bytes(8))), "dataset_bad_size"),
    "scalar": (lambda: saved(x=np.float32(1)), "dataset_bad_shape"),
    "nine axes": (lambda: saved(x=np.zeros((1,) * 9)), "dataset_bad_shape"),
    "no rows": (lambda: saved(x=np.zeros((0, 3))), "dataset_empty"),
    "unequal rows": (lambda: saved(x=np.zeros(3), y=np.zeros(4)), "dataset_unequal_rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", NPZ_CASES)
def test_a_hostile_npz_is_refused_and_nothing_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, code = NPZ_CASES[name]
    path = tmp_path / "data.npz"
    path.write_bytes(make())
    with pytest.raises(DatasetRejected) as caught:
        check_dataset(path, "npz")
    assert caught.value.code == code, caught.value.detail
    assert not (tmp_path / "marker").exists()


def tensors(entries: object, data: bytes = b"", raw: bytes | None = None) -> bytes:
    text = raw if raw is not None else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TENSOR_CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "dataset_bad_header"),
    "huge header length": (struct.pack("<Q", 2**63) + b"{}", "dataset_bad_header"),
    "header longer than allowed": (struct.pack("<Q", 17 * 2**20) + b" " * (17 * 2**20), "dataset_bad_header"),
    "not JSON": (tensors(None, raw=b"{'x'"), "dataset_bad_header"),
    "not UTF-8": (tensors(None, raw=b'{"\xff": 1}'), "dataset_bad_header"),
    "deep JSON": (tensors(None, raw=b'{"x":' * 50_000), "dataset_bad_header"),
    "a deep value": (tensors(None, raw=b'{"x":' + b"[" * 900 + b"]" * 900 + b"}"), "dataset_bad_header"),
    "a deep dtype": (tensors({"x": entry(json.loads("[" * 800 + "]" * 800))}, bytes(8)), "dataset_bad_dtype"),
    "an integer of thousands of digits": (
        tensors(None, raw=b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}'),
        "dataset_bad_header",
    ),
    "a list": (tensors([]), "dataset_bad_header"),
    "no tensors": (tensors({}), "dataset_empty"),
    "duplicate key": (
        tensors(None, bytes(8), raw=json.dumps({"x": entry(), "y": entry()}).replace('"y"', '"x"').encode()),
        "dataset_bad_header",
    ),
    "NaN in the header": (tensors(None, bytes(8), raw=b'{"x": NaN}'), "dataset_bad_header"),
    "a missing key": (tensors({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), "dataset_bad_header"),
    "a negative offset": (tensors({"x": entry(offsets=[-8, 0])}, bytes(8)), "dataset_bad_header"),
    "a boolean size": (tensors({"x": entry(shape=[True, 2])}, bytes(8)), "dataset_bad_header"),
    "a float size": (tensors({"x": entry(shape=[2.0])}, bytes(8)), "dataset_bad_header"),
    "a hole": (tensors({"x": entry(offsets=[8, 16])}, bytes(16)), "dataset_bad_header"),
    "overlap": (tensors({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)), "dataset_bad_header"),
    "trailing bytes": (tensors({"x": entry()}, bytes(9)), "dataset_bad_header"),
    "truncated": (tensors({"x": entry()}, bytes(7)), "dataset_bad_header"),
    "size that disagrees": (tensors({"x": entry(shape=[3])}, bytes(8)), "dataset_bad_size"),
    "overflow": (tensors({"x": entry(shape=[2**62, 2**62])}, bytes(8)), "dataset_bad_size"),
    "bfloat16": (tensors({"x": entry("BF16", [4])}, bytes(8)), "dataset_bad_dtype"),
    "unknown dtype": (tensors({"x": entry("PICKLE")}, bytes(8)), "dataset_bad_dtype"),
    "20,000 tensors": (
        tensors({f"t{i}": entry("U8", [1], [i, i + 1]) for i in range(20_000)}, bytes(20_000)),
        "dataset_too_many_columns",
    ),
    "unequal rows": (
        tensors({"x": entry(), "y": entry("U8", [3], [8, 11])}, bytes(11)), "dataset_unequal_rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_CASES)
def test_a_hostile_safetensors_file_is_refused(name: str, tmp_path: Path) -> None:
    raw, code = TENSOR_CASES[name]
    path = tmp_path / "data.safetensors"
    path.write_bytes(raw)
    with pytest.raises(DatasetRejected) as caught:
        check_dataset(path, "safetensors")
    assert caught.value.code == code, caught.value.detail


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), deflated=st.booleans())
def test_any_changed_byte_is_refused_or_harmless(tmp_path: Path, position: float, value: int, deflated: bool) -> None:
    table = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "y": np.arange(4)}
    buffer = io.BytesIO()
    (np.savez_compressed if deflated else np.savez)(buffer, **table)  # type: ignore[arg-type]
    raw = bytearray(buffer.getvalue())
    raw[int(position * len(raw))] ^= value
    path = tmp_path / "data.npz"
    path.write_bytes(raw)
    try:
        facts = check_dataset(path, "npz")
    except DatasetRejected:
        return
    assert facts.num_rows == 4


def test_a_member_bigger_than_32_bits_allow_is_described_by_zip64(tmp_path: Path) -> None:
    # numpy always writes zip64 extra fields into local headers; the directory gets them only beyond 4 GiB.
    path = tmp_path / "data.npz"
    raw = bytearray(good())
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    central = raw[start:end]
    size = struct.unpack_from("<L", central, 24)[0]
    central[20:28] = b"\xff" * 8
    central[30:32] = struct.pack("<H", 20)
    central += struct.pack("<2H2Q", 1, 16, size, size)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(central), start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(central), 1)
    path.write_bytes(
        bytes(raw[:start] + central) + record + locator + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)
    )
    assert check_dataset(path, "npz").columns[0].shape == ()
