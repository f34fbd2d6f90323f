"""Columns of text: made into numbers by the model's own tokenizer, or refused when there is none."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from app.recipes.data import Data
from app.recipes.facts import TensorFacts
from worker.engine.errors import RecipeRefused
from worker.engine.programs.hugging_face.tokenizer import check_tokenizer
from worker.engine.programs.program import Signature
from worker.engine.training.examples import BoundExamples, open_examples

ID = "dst_" + "a" * 26
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "on", "a", "mat"]
TEXTS = ["the cat sat", "a mat", "the dog", "the cat sat on the mat"]


def make_tokenizer(**said: Any) -> bytes:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    if said:
        tokenizer.enable_padding(**said)
    return bytes(tokenizer.to_str(), "utf-8")


def facts(name: str, *shape: int | str, dtype: str = "int64") -> TensorFacts:
    return TensorFacts(name=name, dtype=dtype, shape=shape)


def bind(
    directory: Path,
    *inputs: TensorFacts,
    tokenizer: bytes | None,
    binding: dict[str, Any] | None = None,
    texts: list[str] | None = None,
    ranges: Any = None,
    **data: Any,
) -> BoundExamples:
    path = directory / "data.parquet"
    pq.write_table(pa.table({"text": texts or TEXTS, "y": [0] * len(texts or TEXTS)}), path, row_group_size=3)
    bound = {each.name: {"column": "text", **(binding or {})} for each in inputs}
    spec = Data.model_validate({"dataset_id": ID, "inputs": bound, **data})
    model = Signature(inputs, (facts("logits", "batch", "sequence", 10, dtype="float32"),), None, ranges or {})
    return open_examples(spec, {ID: (path, "parquet")}, model, 0, directory, tokenizer)


def rows_of(examples: BoundExamples) -> list[list[list[int]]]:
    """Return every row: one list per input, ordered by the text's length."""
    batches = [*examples.training_batches(2, seed=0), *examples.evaluation_batches(2)]
    rows = [[each[row].tolist() for each in inputs] for inputs, _ in batches for row in range(len(inputs[0]))]
    return sorted(rows, key=str)


def test_one_column_of_text_feeds_every_integer_input(tmp_path: Path) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [facts(name, "batch", "sequence") for name in names]
    rows = rows_of(bind(tmp_path, *inputs, tokenizer=make_tokenizer(), binding={"max_tokens": 6}))
    assert rows == sorted(
        [
            [[1, 4, 5, 6, 2, 0], [1, 1, 1, 1, 1, 0], [0] * 6],
            [[1, 8, 9, 2, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6],
            [[1, 4, 3, 2, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6],
            [[1, 4, 5, 6, 7, 2], [1, 1, 1, 1, 1, 1], [0] * 6],
        ],
        key=str,
    )


def test_padding_is_on_the_right_with_the_number_that_the_tokenizer_says(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(direction="left", pad_id=9, pad_token="mat", length=3)
    rows = rows_of(bind(tmp_path, facts("ids", "batch", 7), tokenizer=tokenizer))
    assert [1, 4, 3, 2, 9, 9, 9] in [row[0] for row in rows]


@pytest.mark.parametrize(
    ("size", "ranges", "binding", "expected"),
    [
        ("sequence", {}, {}, 128),
        ("sequence", {"sequence": (2, 32)}, {}, 32),
        (12, {}, {}, 12),
        ("sequence", {}, {"max_tokens": 5}, 5),
    ],
)
def test_length_is_the_models_or_what_is_said(
    tmp_path: Path, size: Any, ranges: Any, binding: dict[str, Any], expected: int
) -> None:
    bound = facts("input_ids", "batch", size)
    examples = bind(tmp_path, bound, tokenizer=make_tokenizer(), ranges=ranges, binding=binding)
    assert next(iter(examples.training_batches(1, seed=0)))[0][0].shape == (1, expected)


def test_what_an_input_gets_can_be_said(tmp_path: Path) -> None:
    examples = bind(
        tmp_path, facts("b", "batch", 4), tokenizer=make_tokenizer(), binding={"tokens": "mask"}, texts=["a", "the"]
    )
    assert rows_of(examples) == [[[1, 1, 1, 0]], [[1, 1, 1, 0]]]


def test_padding_is_not_predicted_though_the_model_takes_no_mask(tmp_path: Path) -> None:
    examples = bind(
        tmp_path, facts("input_ids", "batch", 5), tokenizer=make_tokenizer(), texts=["a", "a"], task="language_modeling"
    )
    (_, labels) = next(iter(examples.training_batches(1, seed=0)))
    assert labels is not None
    assert labels.tolist() == [[1, 8, 2, -100, -100]]


def test_texts_are_encoded_once_and_mapped(tmp_path: Path) -> None:
    texts = [f"the cat sat on mat {number}" for number in range(1500)]
    inputs = [facts(name, "batch", "sequence") for name in ("input_ids", "attention_mask")]
    bind(tmp_path, *inputs, tokenizer=make_tokenizer(), texts=texts)
    files = sorted(tmp_path.glob("*.bin"))
    assert [file.name.rsplit(".", 2)[1] for file in files] == ["ids", "mask", "types"]
    assert {file.stat().st_size for file in files} == {1500 * 128 * 8}
    before = [file.stat().st_mtime_ns for file in files]
    bind(tmp_path, *inputs, tokenizer=make_tokenizer(), texts=texts)
    assert [file.stat().st_mtime_ns for file in files] == before


def strange(**parts: Any) -> bytes:
    """Return a tokenizer that the check at intake lets through, and that the library cannot use."""
    raw = json.dumps({**json.loads(make_tokenizer()), **parts}).encode()
    assert check_tokenizer(raw)
    return raw


SECOND = {"Sequence": {"id": "B", "type_id": 0}}
MARK = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
IDS = facts("input_ids", "batch", "sequence")
REFUSED: dict[str, tuple[TensorFacts, bytes | None, dict[str, Any], str, str]] = {
    "no tokenizer": (IDS, None, {}, "no_tokenizer", "without a tokenizer"),
    "a broken tokenizer": (IDS, b'{"model": 7}', {}, "bad_tokenizer", "tokenizer.json"),
    "not UTF-8": (IDS, b"\xff", {}, "bad_tokenizer", "tokenizer.json"),
    "a panic while it is opened": (
        IDS, strange(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), {}, "bad_tokenizer",
        "precompiled_charsmap",
    ),
    "a panic while it encodes": (
        IDS,
        strange(post_processor={"type": "TemplateProcessing", "single": [SECOND], "pair": [SECOND, SECOND],
                                  "special_tokens": {}}),
        {}, "bad_tokenizer", "index out of bounds",
    ),
    "more marks than tokens": (
        facts("x", "batch", 4),
        strange(post_processor={"type": "TemplateProcessing", "single": [MARK] * 6, "pair": [MARK, SECOND],
                                  "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}}}),
        {}, "bad_tokenizer", "6 tokens where 4",
    ),
    "fractions": (facts("x", "batch", 4, dtype="float32"), make_tokenizer(), {}, "dtype_mismatch", "float32"),
    "three axes": (facts("x", "batch", 4, 4), make_tokenizer(), {}, "dtype_mismatch", "4, 4"),
    "scaled": (IDS, make_tokenizer(), {"scale": 2.0}, "dtype_mismatch", "scale"),
    "resized": (IDS, make_tokenizer(), {"resize": [2, 2]}, "dtype_mismatch", "not images"),
    "another length": (facts("x", "batch", 4), make_tokenizer(), {"max_tokens": 5}, "shape_mismatch", "5"),
    "tokens of numbers": (IDS, make_tokenizer(), {"column": "y", "max_tokens": 5}, "dtype_mismatch", "for text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    tensor, tokenizer, binding, code, words = REFUSED[name]
    with pytest.raises(RecipeRefused) as caught:
        bind(tmp_path, tensor, tokenizer=tokenizer, binding=binding)
    assert caught.value.code == code
    assert words in caught.value.detail
    assert caught.value.fix
