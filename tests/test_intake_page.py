"""docs/intake.md explains every code with which a file can be rejected, and names tests that exist."""

import re
from pathlib import Path

from tests.fuzz.hunt import documented_codes

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r'(?:\b(?:reject|_refuse)\(\s*|\bcode=)"([a-z]+(?:_[a-z0-9]+)+)"')


def codes_in_the_sources() -> set[str]:
    found: set[str] = set()
    folders = [ROOT / "worker/engine/programs", ROOT / "worker/engine/training"]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        # What a recipe asks for, and not what a file is.
        found |= set(CODE.findall(re.sub(r"RecipeRefused\(.*?\n        \)", "", text, flags=re.DOTALL)))
    return found


def test_every_code_of_a_rejection_is_explained() -> None:
    assert sorted(codes_in_the_sources() - documented_codes() - JOBS) == []


JOBS = {
    "bad_tokenizer", "capture_failed", "compilation_failed", "compiled_differs", "dtype_mismatch",
    "empty_split", "images_differ_in_size", "label_out_of_range",
    "labels_cannot_move", "labels_do_not_fit", "layers_do_not_fit", "no_tokenizer", "nothing_to_train",
    "onnx_export_failed", "output_not_finite", "packed_export_failed", "resize_too_large", "shape_mismatch",
    "size_became_fixed", "too_few_examples", "training_diverged", "unknown_column",
}  # fmt: skip
"""Codes of jobs: of a recipe that does not fit a file, of training and of exports."""


def test_no_code_is_explained_that_is_gone() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "worker/engine").rglob("*.py"))
    gone = [code for code in documented_codes() if f'"{code.removeprefix("format_")}"' not in text]
    assert gone == []


def test_the_tests_that_the_page_names_exist() -> None:
    page = (ROOT / "docs/intake.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)` in \[[^\]]+\]\(\.\./([^)]+)\)", page)
    assert len(named) > 20
    missing = [name for name, path in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert missing == []
