"""Columns of text, made into the numbers that a model takes by the model's own tokenizer."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from app.recipes.data import Tokens
from worker.engine.errors import RecipeRefused
from worker.engine.training.columns import Column, scratch_file, write_once
from worker.engine.training.rows import Rows

PARTS: tuple[Tokens, ...] = ("ids", "mask", "types")
PADDING_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
"""Tried in this order where tokenizer.json does not say; where the mask is zero, any number will do."""


def encode_texts(
    path: Path, column: Column, tokenizer: bytes | None, max_tokens: int, directory: Path
) -> dict[Tokens, Rows]:
    """Return read-only memory maps [rows, max_tokens] of int64: token numbers, attention mask, token types.

    The tokenizer adds its special tokens; longer texts are cut, shorter ones padded on the right. Raises RecipeRefused
    with code no_tokenizer or bad_tokenizer.
    """
    if tokenizer is None:
        raise RecipeRefused(
            f"column {column.name!r} is text, and the model was uploaded without a tokenizer that Pare can use",
            code="no_tokenizer",
            fix="Upload the model as the zip of its Hugging Face folder with tokenizer.json (format=hf), or tokenize "
            "the text and upload the numbers.",
        )
    shape = (column.num_rows, max_tokens)
    place = hashlib.sha256(column.name.encode()).hexdigest()[:32]
    files = {part: scratch_file(path, directory, "text", place, max_tokens, part) for part in PARTS}
    if not all(file.exists() for file in files.values()):
        together = scratch_file(path, directory, "text", place, max_tokens)
        write_once(together, (block.tobytes() for block in _encode(path, column, tokenizer, max_tokens)))
        rows = Rows(together, np.dtype(np.int64), (column.num_rows, len(PARTS), max_tokens))
        for index, part in enumerate(PARTS):
            write_once(files[part], (block[:, index].tobytes() for block in rows.blocks()))
        together.unlink()
    return {part: Rows(file, np.dtype(np.int64), shape) for part, file in files.items()}


def _encode(path: Path, column: Column, raw: bytes, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield [rows, 3, max_tokens] for a few hundred rows at a time."""
    tokenizer = _open_tokenizer(raw, max_tokens)
    for texts in column.read_texts(path):
        try:
            encoded = tokenizer.encode_batch(texts)
        except BaseException as error:
            _raise_unless_panic(error)
            raise _bad_tokenizer(f"it cannot encode column {column.name!r}: {str(error)[:200]}") from error
        lengths = sorted({len(row.ids) for row in encoded} - {max_tokens})
        if lengths:
            raise _bad_tokenizer(f"it gives {lengths[-1]} tokens where {max_tokens} are asked for")
        yield np.array([(row.ids, row.attention_mask, row.type_ids) for row in encoded], dtype=np.int64)


def _open_tokenizer(raw: bytes, max_tokens: int):  # type: ignore[no-untyped-def]
    # Threads of its own would be beyond the engine's limits.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
        said = tokenizer.padding or {}
        token = said.get("pad_token")
        if token is None:
            token = next((each for each in PADDING_TOKENS if tokenizer.token_to_id(each) is not None), "[PAD]")
        number = tokenizer.token_to_id(token)
        tokenizer.enable_truncation(max_tokens)
        tokenizer.enable_padding(
            direction="right",
            pad_id=0 if number is None else number,
            pad_type_id=said.get("pad_type_id", 0),
            pad_token=token,
            length=max_tokens,
        )
    except BaseException as error:
        _raise_unless_panic(error)
        raise _bad_tokenizer(str(error)[:200]) from error
    return tokenizer


def _raise_unless_panic(error: BaseException) -> None:
    # What stops the library's Rust code is no Exception, so that it ends programs. Here it is the file's fault.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _bad_tokenizer(what: str) -> RecipeRefused:
    return RecipeRefused(
        f"the model's tokenizer.json cannot be used: {what}",
        code="bad_tokenizer",
        fix="Upload the folder with a tokenizer.json of the library `tokenizers`, or tokenize the text yourself.",
    )
