"""Real English text that every machine has: the docstrings of Python's own standard library.

    python benchmarks/corpus.py          # says how much there is, and shows a few sentences

The text differs a little between Python versions; every table says which one it was measured with.
"""

import ast
import random
import re
import sysconfig
import warnings
from functools import cache
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SENTENCE_LENGTHS = range(30, 300)


@cache
def read_docstrings() -> tuple[str, ...]:
    """Return every docstring of the standard library, tests aside, in a fixed order, each once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and text.isascii():
                found[text] = None
    return tuple(found)


def read_sentences(count: int, seed: int = 0) -> list[str]:
    """Return `count` different whole sentences in an order fixed by the seed."""
    sentences: dict[str, None] = {}
    for docstring in read_docstrings():
        for paragraph in re.split(r"\n\s*\n", docstring):
            for sentence in re.split(r"(?<=[.!?]) ", " ".join(paragraph.split())):
                if len(sentence) in SENTENCE_LENGTHS and sentence[0].isupper() and sentence[-1] in ".!?":
                    sentences[sentence] = None
    ordered = list(sentences)
    if count > len(ordered):
        raise ValueError(f"{count} sentences were asked for; the standard library has {len(ordered)}")
    random.Random(seed).shuffle(ordered)
    return ordered[:count]


def read_text(seed: int = 0) -> tuple[str, str]:
    """Return text to train on and text to measure on: whole docstrings, nine tenths and one tenth."""
    docstrings = list(read_docstrings())
    random.Random(seed).shuffle(docstrings)
    cut = len(docstrings) * 9 // 10
    return "\n\n".join(docstrings[:cut]), "\n\n".join(docstrings[cut:])


if __name__ == "__main__":
    training, held_out = read_text()
    print(f"{len(read_docstrings()):,} docstrings, {len(training):,} + {len(held_out):,} characters")
    print("\n".join(read_sentences(5)))
