"""tokenizer.json: read strictly and written anew, before the library `tokenizers` ever sees it.

Only what turns a text into numbers is kept. What the library would compile (regular expressions) has a grammar of its
own (patterns.py); what it would compute without end (padding, truncation, the longest word) is bounded.
"""

import json
from collections.abc import Callable
from typing import Any

from worker.engine.errors import ModelRejected
from worker.engine.programs.hugging_face.patterns import check_pattern
from worker.engine.programs.json_reader import boolean, integer, items, mapping, number, parse_json, record, text, union
from worker.engine.programs.rejections import reject, shown

Check = Callable[[Any, str], Any]
_MAX_WORDS, _MAX_WORD, _MAX_DEPTH, _MAX_STEPS = 2_000_000, 1000, 4, 50
_LONGEST_WORD_CHARACTERS = 1000
_TOP = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
        "model")  # fmt: skip


class NoTokenizer(Exception):
    """tokenizer.json is more, or less, than what Pare uses; the message says where."""


def check_tokenizer(raw: bytes) -> bytes:
    """Return the text of a tokenizer that means the same and holds nothing else; raises NoTokenizer."""
    try:
        return json.dumps(_rebuild(parse_json(raw, "tokenizer.json")), ensure_ascii=False).encode()
    except ModelRejected as error:
        raise NoTokenizer(error.detail) from None
    except UnicodeEncodeError:
        raise NoTokenizer("tokenizer.json holds half of a surrogate pair.") from None


def _rebuild(value: Any) -> dict[str, Any]:
    where = "tokenizer.json"
    given = record(value, where, ("model",), _TOP)
    return {
        "version": "1.0",
        # Both are set anew wherever texts are encoded; of padding only the token counts.
        "truncation": None,
        "padding": _padding(given.get("padding"), f"{where}: padding"),
        "added_tokens": [
            _fields(token, f"{where}: added_tokens", _TOKEN)
            for token in items(given.get("added_tokens") or [], f"{where}: added_tokens", 100_000)
        ],
        "normalizer": _part(given.get("normalizer"), f"{where}: normalizer", _NORMALIZERS, "normalizers"),
        "pre_tokenizer": _part(given.get("pre_tokenizer"), f"{where}: pre_tokenizer", _SPLITTERS, "pretokenizers"),
        "post_processor": _part(given.get("post_processor"), f"{where}: post_processor", _PROCESSORS, "processors"),
        # Turns numbers into text, which Pare never does.
        "decoder": None,
        "model": _model(mapping(given["model"], f"{where}: model"), f"{where}: model"),
    }


def _word(value: Any, where: str) -> str:
    return text(value, where, _MAX_WORD)


def _count(value: Any, where: str) -> int:
    return integer(value, where, 0, _MAX_WORDS)


def _choice(*allowed: str) -> Check:
    def check(value: Any, where: str) -> str:
        if value not in allowed or not isinstance(value, str):
            reject("bad_tokenizer", f"{where}: {shown(value)} is not one of {', '.join(allowed)}.")
        return value

    return check


def _nullable(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _pattern(value: Any, where: str) -> dict[str, str]:
    kind, content = union(value, where, ("String", "Regex"))
    found = _word(content, where)
    if kind == "Regex":
        check_pattern(found, where)
    return {kind: found}


def _pair(value: Any, where: str) -> list[Any]:
    pair = items(value, where, 2)
    if len(pair) != 2:
        reject("bad_tokenizer", f"{where}: {shown(value)} is not a token and its number.")
    return [_word(pair[0], where), _count(pair[1], where)]


def _template(value: Any, where: str) -> list[Any]:
    found = []
    for piece in items(value, where, _MAX_STEPS):
        kind, content = union(piece, where, ("Sequence", "SpecialToken"))
        name: Check = _choice("A", "B") if kind == "Sequence" else _word
        found.append({kind: _fields(content, where, {"id": name, "type_id": _type_number})})
    return found


def _special_tokens(value: Any, where: str) -> dict[str, Any]:
    found = {}
    for name, token in list(mapping(value, where).items())[: _MAX_STEPS + 1]:
        given = record(token, where, ("id", "ids", "tokens"))
        found[_word(name, where)] = {
            "id": _word(given["id"], where),
            "ids": [_count(each, where) for each in items(given["ids"], where, _MAX_STEPS)],
            "tokens": [_word(each, where) for each in items(given["tokens"], where, _MAX_STEPS)],
        }
    if len(found) > _MAX_STEPS:
        reject("bad_tokenizer", f"{where}: more than {_MAX_STEPS} tokens.")
    return found


def _type_number(value: Any, where: str) -> int:
    return integer(value, where, 0, 15)


def _letters(value: Any, where: str) -> str:
    return text(value, where, 4 * 2**20)


_BEHAVIOUR = _choice("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_TOKEN: dict[str, Check] = {
    "id": _count, "content": _word, "single_word": boolean, "lstrip": boolean, "rstrip": boolean, "normalized": boolean,
    "special": boolean,
}  # fmt: skip
_BYTE_LEVEL: dict[str, Check] = {"add_prefix_space": boolean, "trim_offsets": boolean, "use_regex": boolean}
_NORMALIZERS: dict[str, dict[str, Check]] = {
    "BertNormalizer": {"clean_text": boolean, "handle_chinese_chars": boolean, "strip_accents": _nullable(boolean),
                       "lowercase": boolean},
    "NFC": {}, "NFD": {}, "NFKC": {}, "NFKD": {}, "Nmt": {}, "Lowercase": {}, "StripAccents": {}, "ByteLevel": {},
    "Strip": {"strip_left": boolean, "strip_right": boolean}, "Prepend": {"prepend": _word},
    "Precompiled": {"precompiled_charsmap": _nullable(_letters)}, "Replace": {"pattern": _pattern, "content": _word},
}  # fmt: skip
_SPLITTERS: dict[str, dict[str, Check]] = {
    "BertPreTokenizer": {}, "Whitespace": {}, "WhitespaceSplit": {}, "UnicodeScripts": {}, "ByteLevel": _BYTE_LEVEL,
    "Metaspace": {"replacement": _word, "add_prefix_space": boolean, "split": boolean,
                  "prepend_scheme": _choice("first", "always", "never"), "str_rep": _word},
    "Punctuation": {"behavior": _BEHAVIOUR}, "Digits": {"individual_digits": boolean},
    "CharDelimiterSplit": {"delimiter": _word},
    "Split": {"pattern": _pattern, "behavior": _BEHAVIOUR, "invert": boolean},
}  # fmt: skip
_PROCESSORS: dict[str, dict[str, Check]] = {
    "BertProcessing": {"sep": _pair, "cls": _pair}, "ByteLevel": _BYTE_LEVEL,
    "RobertaProcessing": {"sep": _pair, "cls": _pair, "trim_offsets": boolean, "add_prefix_space": boolean},
    "TemplateProcessing": {"single": _template, "pair": _template, "special_tokens": _special_tokens},
}  # fmt: skip


def _fields(value: Any, where: str, fields: dict[str, Check]) -> dict[str, Any]:
    given = record(value, where, (), tuple(fields))
    return {key: fields[key](each, f"{where}: {key}") for key, each in given.items()}


def _part(value: Any, where: str, known: dict[str, dict[str, Check]], steps: str, depth: int = 0) -> Any:
    """Rebuild a part of the tokenizer: nothing, one step, or a sequence of them."""
    if value is None:
        return None
    given = dict(mapping(value, where))
    kind = _choice("Sequence", *known)(given.pop("type", None), f"{where}: type")
    if kind != "Sequence":
        return {"type": kind, **_fields(given, where, known[kind])}
    if depth >= _MAX_DEPTH:
        reject("bad_tokenizer", f"{where}: sequences are nested deeper than {_MAX_DEPTH}.")
    inner = items(record(given, where, (steps,))[steps], where, _MAX_STEPS)
    return {"type": kind, steps: [_part(each, where, known, steps, depth + 1) for each in inner]}


def _padding(value: Any, where: str) -> dict[str, Any] | None:
    if value is None:
        return None
    given = record(
        value, where, ("pad_token",), ("strategy", "direction", "pad_to_multiple_of", "pad_id", "pad_type_id")
    )
    return {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": _count(given.get("pad_id", 0), where),
        "pad_type_id": _type_number(given.get("pad_type_id", 0), where),
        "pad_token": _word(given["pad_token"], where),
    }


def _model(given: dict[str, Any], where: str) -> dict[str, Any]:
    known = {"WordPiece": _WORD_PIECE, "BPE": _BPE, "Unigram": _UNIGRAM, "WordLevel": _WORD_LEVEL}
    # Files of old versions leave the type out.
    fits = next((kind for kind, fields in known.items() if given.keys() <= fields.keys()), None)
    kind = _choice(*known)(given.get("type", fits), f"{where}: type")
    model = {"type": kind, **_fields({key: given[key] for key in given if key != "type"}, where, known[kind])}
    if kind == "BPE":
        _check_prefix(model, where)
    return model


def _check_prefix(model: dict[str, Any], where: str) -> None:
    """The library cuts the prefix off the second word of each merge, whatever is there, and may end the process."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", ()):
        second = merge[1] if isinstance(merge, list) and len(merge) == 2 else str(merge).rpartition(" ")[2]
        if not second.startswith(prefix):
            reject("bad_tokenizer", f"{where}: the merge {shown(merge)} goes on without the prefix {shown(prefix)}.")


def _vocabulary(value: Any, where: str) -> dict[str, int]:
    words = mapping(value, where)
    if len(words) > _MAX_WORDS:
        reject("bad_tokenizer", f"{where}: {len(words)} words; at most {_MAX_WORDS} are taken.")
    return {_word(word, where): _count(index, where) for word, index in words.items()}


def _scores(value: Any, where: str) -> list[list[Any]]:
    found = []
    for pair in items(value, where, _MAX_WORDS):
        word, score = items(pair, where, 2) if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if isinstance(score, str):
            reject("bad_tokenizer", f"{where}: the score of {shown(word)} is no number.")
        found.append([_word(word, where), number(score, where)])
    return found


def _merges(value: Any, where: str) -> list[Any]:
    found: list[Any] = []
    for merge in items(value, where, _MAX_WORDS):
        pair = merge if isinstance(merge, list) else [merge]
        if len(pair) > 2:
            reject("bad_tokenizer", f"{where}: {shown(merge)} is no pair.")
        words = [text(word, where, 2 * _MAX_WORD) for word in pair]
        found.append(words if isinstance(merge, list) else words[0])
    return found


_WORD_PIECE: dict[str, Check] = {
    "unk_token": _word, "continuing_subword_prefix": _word, "vocab": _vocabulary,
    # The work for a word grows with the square of its length.
    "max_input_chars_per_word": lambda value, where: integer(value, where, 1, _LONGEST_WORD_CHARACTERS),
}  # fmt: skip
_WORD_LEVEL: dict[str, Check] = {"vocab": _vocabulary, "unk_token": _word}
_UNIGRAM: dict[str, Check] = {"unk_id": _nullable(_count), "vocab": _scores, "byte_fallback": boolean}
_BPE: dict[str, Check] = {
    # Dropout would make every encoding another one.
    "dropout": lambda value, where: None if value in (None, 0, 0.0) else integer(value, where, 0, 0),
    "unk_token": _nullable(_word), "continuing_subword_prefix": _nullable(_word),
    "end_of_word_suffix": _nullable(_word), "fuse_unk": boolean, "byte_fallback": boolean, "ignore_merges": boolean,
    "vocab": _vocabulary, "merges": _merges,
}  # fmt: skip
