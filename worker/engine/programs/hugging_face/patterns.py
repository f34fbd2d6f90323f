"""The regular expressions that a tokenizer may split texts at: a small grammar, without what backtracks for ever.

Taken are characters, classes, alternatives, groups, lookahead and repetition, as the tokenizers of GPT-2, Llama 3,
Qwen2 and others use them. Refused are repeated groups, many repetitions in a row, references to groups, lookbehind and
recursion.
"""

import re
from typing import NoReturn

from worker.engine.programs.rejections import reject, shown

_MAX_LENGTH, _MAX_DEPTH, _MAX_TIMES = 1000, 4, 100
_MAX_LOOPS, _MAX_OPTIONS = 3, 5
"""In one alternative: the work for a text grows with as many powers of its length, and doubles with each option."""
_NOTHING = ("open", "other", "edge", "loop", "maybe")
_ESCAPE = r"\\(?:[pP]\{\^?[A-Za-z_]{1,30}\}|[sSdDwWrntfv]|[^A-Za-z0-9\s])"
_TOKEN = re.compile(
    rf"(?P<open>\((?:\?(?:i?:|[=!]))?)|(?P<close>\))|(?P<class>\[\^?(?:{_ESCAPE}|[^\\\[\]&]|&(?!&))+\])"
    rf"|(?P<loop>(?:[*+]|\{{[0-9]{{1,4}}(?:,[0-9]{{0,4}})?\}})[+?]?)|(?P<maybe>\?)|(?P<other>\|)|(?P<edge>[$^])"
    rf"|(?P<atom>{_ESCAPE}|[^\\*+?()\[\]{{}}|$^])",
    re.DOTALL,
)


def check_pattern(pattern: str, where: str) -> None:
    """Raise ModelRejected unless the pattern is of the grammar."""
    if len(pattern) > _MAX_LENGTH:
        _refuse(pattern, where, f"has more than {_MAX_LENGTH} characters")
    position = depth = loops = options = 0
    before = "open"
    while position < len(pattern):
        match = _TOKEN.match(pattern, position)
        if match is None:
            _refuse(pattern, where, f"is not of the accepted grammar at character {position}")
        kind = str(match.lastgroup)
        depth += (kind == "open") - (kind == "close")
        if not 0 <= depth <= _MAX_DEPTH:
            _refuse(pattern, where, "has groups that are nested too deeply or not open")
        if (kind == "loop" and before not in ("atom", "class")) or (kind == "maybe" and before in _NOTHING):
            _refuse(pattern, where, f"repeats at character {position} what cannot be repeated")
        if kind == "loop" and any(int(times) > _MAX_TIMES for times in re.findall(r"[0-9]+", match[0])):
            _refuse(pattern, where, f"repeats more than {_MAX_TIMES} times")
        loops, options = loops + (kind == "loop"), options + (kind == "maybe")
        if loops > _MAX_LOOPS or options > _MAX_OPTIONS:
            _refuse(pattern, where, f"has more than {_MAX_LOOPS} repetitions or {_MAX_OPTIONS} options in a row")
        if kind == "other" and depth == 0:
            loops = options = 0
        before, position = kind, match.end()
    if depth:
        _refuse(pattern, where, "leaves a group open")


def _refuse(pattern: str, where: str, why: str) -> NoReturn:
    reject("bad_tokenizer", f"{where}: the regular expression {shown(pattern)} {why}.")
