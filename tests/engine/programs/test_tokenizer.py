"""tokenizer.json: what the library writes keeps its meaning, and what it would run or compute for ever is refused."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from worker.engine.errors import ModelRejected
from worker.engine.programs.hugging_face.patterns import check_pattern
from worker.engine.programs.hugging_face.tokenizer import NoTokenizer, check_tokenizer

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "##b": 6, "ab": 7, "\u0120a": 8, "\u2581a": 9}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(WORDS, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens([AddedToken("[PAD]", single_word=True)])
    made.enable_padding(pad_token="[PAD]", length=7)
    made.enable_truncation(5)
    return made


def byte_pairs() -> Tokenizer:
    made = Tokenizer(models.BPE(WORDS, [("a", "b")], fuse_unk=True, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram([(word, -float(index)) for word, index in WORDS.items()], unk_id=1))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(), pre_tokenizers.Punctuation()]
    )
    return made


def prefixed_pairs() -> Tokenizer:
    vocabulary = {"[UNK]": 0, "a": 1, "##b": 2, "##a": 3, "ab": 4, "aba": 5}
    merges = [("a", "##b"), ("ab", "##a")]
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]", continuing_subword_prefix="##"))


@pytest.mark.parametrize("make", [word_piece, byte_pairs, prefixed_pairs, unigram, words])
def test_what_the_library_writes_keeps_its_meaning(make: Any) -> None:
    tokenizer = make()
    again = Tokenizer.from_str(check_tokenizer(tokenizer.to_str().encode()).decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    again.no_padding()
    for text in ("a ab b", "ab  ab\n\nA b.", "", "[PAD] a", "12 a"):
        assert again.encode(text).ids == tokenizer.encode(text).ids, text


def test_an_old_file_without_the_type_of_its_model_is_taken() -> None:
    value = json.loads(word_piece().to_str())
    del value["model"]["type"]
    assert json.loads(check_tokenizer(json.dumps(value).encode()))["model"]["type"] == "WordPiece"


def put(*path: Any, value: Any) -> Any:
    def change(tokenizer: Any) -> None:
        for step in path[:-1]:
            tokenizer = tokenizer[step]
        tokenizer[path[-1]] = value

    return change


CHANGES: dict[str, Any] = {
    "code": put("auto_map", value=["x.Y", None]),
    "a file as vocabulary": put("model", "vocab", value="/etc/passwd"),
    "a file of merges": put("model", "merges", value="/etc/passwd"),
    "an unknown model": put("model", "type", value="Python"),
    "an unknown step": put("pre_tokenizer", value={"type": "Custom", "module": "os"}),
    "a step with more": put("normalizer", value={"type": "NFC", "evil": 1}),
    "no pattern": put("normalizer", value={"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}),
    "an endless word": put("model", "max_input_chars_per_word", value=10**9),
    "a number for a word": put("model", "vocab", value={"a": "b"}),
    "a huge number": put("model", "vocab", value={"a": 2**40}),
    "deep sequences": put("normalizer", value=None),
    "a merge without its prefix": put(
        "model",
        value={
            "type": "BPE",
            "vocab": {"a": 0, "\u00e9": 1},
            "merges": [["a", "\u00e9"]],
            "continuing_subword_prefix": "x",
        },
    ),
    "a merge in one text without its prefix": put(
        "model", value={"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"], "continuing_subword_prefix": "##"}
    ),
    "no model": lambda tokenizer: tokenizer.pop("model"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_more_than_a_tokenizer_is_refused(name: str) -> None:
    value = json.loads(word_piece().to_str())
    CHANGES[name](value)
    if name == "deep sequences":
        for _ in range(6):
            value["normalizer"] = {"type": "Sequence", "normalizers": [value["normalizer"]]}
    with pytest.raises(NoTokenizer, match=r"tokenizer\.json"):
        check_tokenizer(json.dumps(value).encode())


def test_length_and_truncation_of_the_file_do_not_count() -> None:
    value = json.loads(word_piece().to_str())
    value["padding"]["pad_to_multiple_of"] = 10**12
    value["padding"]["strategy"] = {"Fixed": 10**12}
    value["truncation"]["stride"] = 10**12
    found = json.loads(check_tokenizer(json.dumps(value).encode()))
    assert found["truncation"] is None
    assert found["padding"]["pad_to_multiple_of"] is None
    assert found["padding"]["strategy"] == "BatchLongest"


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff", b'{"model": 1, "model": 2}', b"[" * 100_000, b'{"model": {"type": "\\ud800"}}']
)
def test_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(NoTokenizer):
        check_tokenizer(text)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, TEKKEN, DEEPSEEK, " {2,}", r"\s+$", r"[0-9][0-9][0-9]|\p{Han}"])
def test_patterns_of_known_tokenizers_are_taken(pattern: str) -> None:
    check_pattern(pattern, "here")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a|a)*b", "a?" * 30 + "a{30}", "a*b*c*d*e", "a{100000}", "a{1,2}{3}", "a**", "*", "(?:a)+"),
        *("(?<=a)b", r"(a)\1", r"\g<0>", "(?R)", "(?P<n>a)", "(?>a)", "(?#x)", "(?(1)a)", "[[:alpha:]]", "[a&&b]"),
        *("(", "a)", "a\\", "[]", r"\p{L", "x" * 2000, "(" * 10 + ")" * 10, "(?i)a"),
    ],
)  # fmt: skip
def test_patterns_that_may_backtrack_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(ModelRejected) as caught:
        check_pattern(pattern, "here")
    assert caught.value.code == "bad_tokenizer"
