"""Parquet tables from strangers: read exactly and little by little; what is no plain table is refused by name."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.recipes.data import Data
from app.recipes.facts import ColumnFacts, TensorFacts
from app.recipes.plan import DatasetFormat
from worker.engine.errors import DatasetRejected, RecipeRefused
from worker.engine.programs.program import Signature
from worker.engine.training.datasets import check_dataset, read_columns
from worker.engine.training.examples import BoundExamples, open_examples

ID, OTHER_ID = "dst_" + "a" * 26, "dst_" + "b" * 26
DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64",
]  # fmt: skip


def arrow(array: np.ndarray, fixed: bool) -> Any:
    """Return an arrow array of (nested) lists, fixed-size or not."""
    values = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        starts = pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32))
        values = pa.FixedSizeListArray.from_arrays(values, size) if fixed else pa.ListArray.from_arrays(starts, values)
    return values


@st.composite
def tables(draw: st.DrawFn) -> dict[str, np.ndarray]:
    rows = draw(st.integers(1, 7))
    names = draw(st.lists(st.sampled_from(["x", "x.y", "y", "list", "label 2"]), min_size=1, max_size=3, unique=True))
    return {
        name: draw(hnp.arrays(draw(st.sampled_from(DTYPES)), (rows, *draw(st.lists(st.integers(1, 3), max_size=2)))))
        for name in names
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), fixed=st.booleans(), group=st.integers(1, 4), words=st.sampled_from(["snappy", "zstd", "none"]))
def test_every_number_is_read_back_exactly(
    tmp_path: Path, table: dict[str, np.ndarray], fixed: bool, group: int, words: str
) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    path = tmp_path / "data.parquet"
    columns = {name: arrow(array, fixed) for name, array in table.items()}
    pq.write_table(pa.table(columns), path, row_group_size=group, compression=words)
    facts = check_dataset(path, "parquet")
    assert facts.num_rows == len(next(iter(table.values())))
    assert {c.name: (c.dtype, c.shape) for c in facts.columns} == {
        name: (array.dtype.name, array.shape[1:]) for name, array in table.items()
    }
    for column in read_columns(path, "parquet"):
        np.testing.assert_array_equal(column.open_rows(path, tmp_path)[:], table[column.name])


@pytest.mark.parametrize("encoded", [False, True])
def test_text_is_read_back_row_by_row(tmp_path: Path, encoded: bool) -> None:
    path = tmp_path / "data.parquet"
    texts = ["a", "", "gr\u00fcn", "a"] * 400
    array = pa.array(texts).dictionary_encode() if encoded else pa.array(texts)
    pq.write_table(pa.table({"text": array}), path, row_group_size=700)
    assert check_dataset(path, "parquet").columns == (ColumnFacts(name="text", dtype="string", shape=()),)
    (column,) = read_columns(path, "parquet")
    assert [text for block in column.read_texts(path) for text in block] == texts


def test_a_table_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    block = np.random.default_rng(0).normal(size=(1000, 500)).astype(np.float32)  # 2 MB
    kind = pa.list_(pa.float32(), 500)
    with pq.ParquetWriter(path, pa.schema([("x", kind)]), compression="none", use_dictionary=False) as writer:
        for _ in range(30):
            writer.write_table(pa.table({"x": arrow(block, fixed=True)}), row_group_size=30_000)
    pool = pa.system_memory_pool()
    before = pool.max_memory()
    tracemalloc.start()
    (column,) = read_columns(path, "parquet")
    rows = column.open_rows(path, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.shape == (30_000, 500)
    np.testing.assert_array_equal(rows[29_000:], block)
    assert peak < 16e6
    assert pool.max_memory() - before < 24e6, "60 MB of numbers"


def written(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        written(x=np.arange(10.0))(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def holding(raw: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(raw)

    return write


def not_utf8(path: Path) -> None:
    pq.write_table(pa.table({"t": ["a text", "another"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"another", b"anothe\x80"))


def bomb(path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array(np.zeros(35_000_000))}), path, compression="zstd")


def text_bomb(path: Path) -> None:
    """A word of a MB, 300 times: the file holds it once."""
    words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(300, np.int32)), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"x": words}), path, compression="zstd")


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "empty file": (holding(b""), "dataset_not_parquet", "PAR1"),
    "not parquet": (holding(b"hello" * 50), "dataset_not_parquet", "PAR1"),
    "cut at the end": (with_bytes(lambda raw: raw[:-20]), "dataset_not_parquet", "PAR1"),
    "huge footer": (with_bytes(lambda raw: raw[:-8] + b"\xff\xff\xff\x7fPAR1"), "dataset_not_parquet", "footer"),
    "footer of nonsense": (with_bytes(lambda raw: raw[:-60] + b"\xff" * 52 + raw[-8:]), "dataset_corrupt", "damaged"),
    "a text that is not UTF-8": (not_utf8, "dataset_corrupt", "UTF-8"),
    "pages of nonsense": (with_bytes(lambda raw: raw[:4] + b"\xff" * 90 + raw[94:]), "dataset_corrupt", "damaged"),
    "encrypted footer": (with_bytes(lambda raw: raw[:-4] + b"PARE"), "dataset_encrypted", "encrypted"),
    "no rows": (written(x=pa.array([], pa.float32())), "dataset_empty", "'x'"),
    "no text": (written(x=pa.array([], pa.string())), "dataset_empty", "'x'"),
    "null": (written(x=pa.array([1, 2, None])), "dataset_null", "row 2"),
    "null text": (written(x=pa.array(["a", None])), "dataset_null", "row 1"),
    "null list": (written(x=pa.array([[1], None])), "dataset_null", "row 1"),
    "null in a list": (written(x=pa.array([[1, 2], [3, 4], [5, None]])), "dataset_null", "row 2"),
    "ragged": (written(x=pa.array([[1, 2], [3, 4], [5]])), "dataset_ragged", "row 2 has 1 values, the first row has 2"),
    "ragged inside": (
        written(x=pa.array([[[1], [2]], [[3], [4, 5]]])), "dataset_ragged", "row 1 has 2 values, the first row has 1",
    ),
    "empty lists": (written(x=pa.array([[], []], pa.list_(pa.int64()))), "dataset_empty", "'x'"),
    "struct": (written(x=pa.array([{"a": 1}])), "dataset_bad_dtype", "struct<a: int64>"),
    "map": (written(x=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))), "dataset_bad_dtype", "map<"),
    "list of text": (written(x=pa.array([["a"]])), "dataset_bad_dtype", "lists of text"),
    "bytes": (written(x=pa.array([b"a"])), "dataset_bad_dtype", "binary"),
    "dates": (written(x=pa.array([1], pa.date32())), "dataset_bad_dtype", "date32"),
    "decimals": (written(x=pa.array([1], pa.decimal128(5))), "dataset_bad_dtype", "decimal"),
    "path as a name": (written(**{"../x": [1]}), "dataset_bad_name", "'../x'"),
    "the same name twice": (
        lambda path: pq.write_table(pa.table([[1], [2]], names=["x", "x"]), path), "dataset_duplicate_column", "'x'",
    ),
    "too many columns": (written(**{f"c{i}": [1] for i in range(1001)}), "dataset_too_many_columns", "1001"),
    "a bomb": (bomb, "dataset_too_large_unpacked", "280000"),
    "a bomb of text": (text_bomb, "dataset_too_large_unpacked", "times its size"),
    "a long text": (written(x=["a", "b" * 2_000_000]), "dataset_text_too_long", "row 1 has 2000000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_plain_table_is_refused(name: str, tmp_path: Path) -> None:
    write, code, words = CASES[name]
    path = tmp_path / "data.parquet"
    write(path)
    with pytest.raises(DatasetRejected) as caught:
        check_dataset(path, "parquet")
    assert caught.value.code == code, caught.value.detail
    assert words in caught.value.detail


def flip(path: Path, position: float, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(position * len(raw))] ^= value
    path.write_bytes(raw)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_any_changed_byte_is_refused_or_harmless(tmp_path: Path, position: float, value: int) -> None:
    path = tmp_path / "data.parquet"
    table = {"x": arrow(np.arange(12.0).reshape(4, 3), fixed=False), "t": pa.array(["a", "b", "c", "a"])}
    pq.write_table(pa.table(table), path, compression="none", write_page_checksum=True)
    flip(path, position, value)
    try:
        facts = check_dataset(path, "parquet")
    except DatasetRejected:
        return
    assert facts.num_rows == 4


def bind(path: Path, directory: Path, files: Any = None, **data: Any) -> BoundExamples:
    spec = Data.model_validate({"dataset_id": ID, "inputs": {"x": {"column": "x"}}, **data})
    inputs = (TensorFacts(name="x", dtype="float32", shape=("batch", 3)),)
    outputs = (TensorFacts(name="logits", dtype="float32", shape=("batch", 2)),)
    every: dict[str, tuple[Path, DatasetFormat]] = {ID: (path, "parquet"), **(files or {})}
    return open_examples(spec, every, Signature(inputs, outputs, None), 0, directory)


def rows_of(examples: BoundExamples) -> tuple[list[float], list[float]]:
    return (
        sorted(v for inputs, _ in examples.training_batches(8, seed=0) for v in inputs[0][:, 0].tolist()),
        sorted(v for inputs, _ in examples.evaluation_batches(8) for v in inputs[0][:, 0].tolist()),
    )


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (["train", "test", "other", "train", "test", "train"], {}),
        (["a", "b", "", "a", "b", "a"], {"training_split": "a", "evaluation_split": "b"}),
        ([0, 1, 2, 0, 1, 0], {"training_split": "0", "evaluation_split": "1"}),
    ],
)
def test_a_column_says_which_rows_are_for_what(tmp_path: Path, column: list[Any], names: dict[str, str]) -> None:
    path = tmp_path / "data.parquet"
    x = arrow(np.arange(6, dtype=np.float32).repeat(3).reshape(6, 3), fixed=True)
    written(x=x, part=column, y=[0, 1] * 3)(path)
    options = {"label_column": "y", "task": "classification", "split_column": "part", **names}
    examples = bind(path, tmp_path, **options)
    assert (examples.num_training, examples.num_evaluation) == (3, 2)
    assert rows_of(examples) == ([0.0, 3.0, 5.0], [1.0, 4.0])
    with pytest.raises(RecipeRefused) as caught:
        bind(path, tmp_path, **options | {"evaluation_split": "nothing"})
    assert caught.value.code == "empty_split"
    with pytest.raises(RecipeRefused) as caught:
        bind(path, tmp_path, **options | {"split_column": "x"})
    assert caught.value.code == "dtype_mismatch"
    with pytest.raises(RecipeRefused) as caught:
        bind(path, tmp_path, **options | {"split_column": "nothing"})
    assert caught.value.code == "unknown_column"


def test_text_is_no_label(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    written(x=arrow(np.zeros((4, 3), np.float32), fixed=True), y=["a", "b"] * 2)(path)
    with pytest.raises(RecipeRefused, match="'y' is text") as caught:
        bind(path, tmp_path, label_column="y", task="classification")
    assert caught.value.code == "dtype_mismatch"


def test_training_and_measuring_may_come_from_two_formats(tmp_path: Path) -> None:
    path, other = tmp_path / "data.parquet", tmp_path / "data.npz"
    written(x=arrow(np.zeros((4, 3), np.float32), fixed=True))(path)
    np.savez(other, x=np.ones((2, 3), np.float32))
    examples = bind(path, tmp_path, {OTHER_ID: (other, "npz")}, evaluation_dataset_id=OTHER_ID)
    assert rows_of(examples) == ([0.0] * 4, [1.0] * 2)
