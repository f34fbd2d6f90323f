"""Does every technique work on every kind of model, or is it refused with a reason?

    python -m benchmarks.technique_matrix [--models "hf bert" ...] [--columns distill ...] [--log cells.jsonl]

Every tiny model is opened and described as at upload. Then every technique runs on it, also where it is refused, with
data and few training steps; its file is written, loaded again and compared with the module, within the service's own
tolerances. Measuring, which is the same for all, is left out. With --log finished cells are written down, and left out
when it is started again.
"""

import argparse
import json
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.jobs.validate import find_problems
from app.recipes.facts import DatasetFacts, ModelFacts
from app.recipes.recipe import KINDS, Format, Recipe
from benchmarks.matrix_models import Upload, list_uploads
from worker.engine import load
from worker.engine.artifacts import choose_tolerance
from worker.engine.failures import translate_failure
from worker.engine.programs.describe import describe
from worker.engine.programs.export import export
from worker.engine.programs.intake import open_program
from worker.engine.programs.lowering.integers import find_integer_layers
from worker.engine.programs.program import FileProgram, Program
from worker.engine.progress import Reporter
from worker.engine.steps import Made, expect_steps, run_steps
from worker.engine.techniques.registry import inspect_all
from worker.engine.training.examples import open_examples

DATASET = "dst_" + "a" * 26
NUM_ROWS = 40
VOCABULARIES = (60, 64)
"""Of the language models here."""
TRAINING = {"epochs": 1, "max_steps": 3, "batch_size": 8}
STEPS: dict[str, dict[str, Any]] = {
    "train": TRAINING,
    "derive_student": {"round_to": 2},
    "prune_structured": {"round_to": 2, "criterion": "taylor", "num_batches": 2, "batch_size": 8},
    "factorize_low_rank": {"whiten": True, "num_calibration_examples": 16},
    "prune_magnitude": {},
    "prune_n_m": {"criterion": "wanda", "num_calibration_examples": 16},
    "prune_wanda": {"num_calibration_examples": 16},
    "finetune": TRAINING,
    "distill": TRAINING | {"hidden_weight": 1.0},
    "share_weights": {"training": TRAINING},
    "quantize_mixed": {"num_calibration_examples": 16},
    "quantize_int4": {"method": "gptq", "group_size": 16, "num_calibration_examples": 16},
    "quantize_float": {},
    "quantize_fixed": {},
    "quantize_aware_training": TRAINING | {"num_calibration_examples": 16},
    "quantize_int8": {"mode": "static", "num_calibration_examples": 16},
    "quantize_int8 for torch": {"kind": "quantize_int8"},
    "quantize_int4 for torch": {"kind": "quantize_int4", "bits": 3, "group_size": 16, "quantize_embeddings": True},
}
"""Column -> parameters; the kind is the column's name unless they say it."""
FOR_TORCH = ("quantize_int8 for torch", "quantize_int4 for torch")
# What take_student puts in the place of a model is another row.
assert {step.get("kind", column) for column, step in STEPS.items()} == KINDS.keys() - {"take_student"}
PACKED = ("share_weights", "quantize_float", "quantize_fixed")
"""Whose gain is in model.packed; those for torch are loaded from model.pt2, the others from model.onnx."""
SIGNS = {"works": "yes", "ran": "ran", "refused": "no", "run": "at run", "bug": "BUG"}
Cell = dict[str, str]


@dataclass
class Subject:
    """An opened model with data that suit it."""

    program: Program
    facts: ModelFacts
    dataset: Path
    data: dict[str, Any]


def open_subject(upload: Upload, directory: Path) -> Subject:
    """Write the file, open it as the intake does, and make random inputs and labels for it."""
    file = directory / "model.pt2"
    upload.write(file)
    program = open_program(file, directory, upload.format, upload.architecture)
    facts = describe(program, inspect_all(program))
    inputs = program.example_inputs(program.signature.batch_size or NUM_ROWS, seed=1)
    with torch.no_grad():
        rows = program.module.eval()(*inputs)[0].shape[1:]
    while len(inputs[0]) < NUM_ROWS:
        inputs = tuple(torch.cat([each, each]) for each in inputs)
    arrays = {f"x{index}": each.numpy() for index, each in enumerate(inputs)}
    data: dict[str, Any] = {
        "dataset_id": DATASET,
        "inputs": {tensor.name: {"column": f"x{index}"} for index, tensor in enumerate(facts.inputs)},
    }
    random = np.random.default_rng(0)
    if len(rows) == 2 and rows[-1] in VOCABULARIES:
        data["task"] = "language_modeling"
    elif len(rows) == 1:
        data |= {"task": "classification", "label_column": "y"}
        arrays["y"] = random.integers(0, rows[0], len(inputs[0]))
    else:
        data |= {"task": "regression", "label_column": "y"}
        arrays["y"] = random.standard_normal((len(inputs[0]), *rows)).astype(np.float32)
    np.savez(directory / "data.npz", **arrays)  # type: ignore[arg-type]
    return Subject(program, facts, directory / "data.npz", data)


def fill(subject: Subject, column: str, *, files: bool) -> Cell:
    """Return what one technique does on one model; without files its program is only called."""
    target = {"runtime": "torch"} if column in FOR_TORCH else {}
    recipe = Recipe.model_validate(
        {"steps": [{"kind": column, **STEPS[column]}], "data": subject.data, "target": target}
    )
    kind = recipe.steps[0].kind
    # As the engine gets it: through the database and the plan.
    recipe = Recipe.model_validate_json(recipe.model_dump_json())
    capability = next(each for each in subject.facts.capabilities if each.kind == kind)
    problems = find_problems(recipe, subject.facts, _describe_data(subject.dataset), None)
    place = Path(tempfile.mkdtemp())
    try:
        outcome, note = "works" if files else "ran", _run(subject, recipe, place, files=files)
    except Exception as failure:  # whatever it is, it is what the table is about
        error = translate_failure(failure, kind)
        if error.code == "engine_crash":
            traceback.print_exc()
        outcome = "bug" if error.code in ("engine_crash", "verification_failed", "out_of_memory") else "run"
        note = f"{error.code}: {error.detail}"
    finally:
        shutil.rmtree(place)
    if not problems:
        return {"outcome": outcome, "note": note}
    reason = capability.missing if not capability.applicable else None
    note = reason or "; ".join(each.detail for each in problems)
    if outcome in ("works", "ran"):
        return {"outcome": "bug", "note": f"refused, but works: {note}"}
    return {"outcome": "refused", "note": note}


def _describe_data(path: Path) -> DatasetFacts:
    with np.load(path) as arrays:
        columns = [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape[1:])} for name, array in arrays.items()
        ]
        return DatasetFacts.model_validate({"num_rows": len(arrays["x0"]), "columns": columns})


def _run(subject: Subject, recipe: Recipe, directory: Path, *, files: bool) -> str:
    """Run the step and return the name of the file that was written, loaded and compared."""
    kind = recipe.steps[0].kind
    program = subject.program.copy()
    assert recipe.data is not None
    examples = open_examples(
        recipe.data, {DATASET: (subject.dataset, "npz")}, program.signature, 0, directory, program.tokenizer
    )
    reporter = Reporter(lambda _line: None)
    reporter.expect(expect_steps(recipe))
    made = run_steps(
        recipe,
        program,
        examples,
        num_threads=1,
        directory=directory,
        reporter=reporter,
        open_original=subject.program.copy,
    )
    if not files and isinstance(made.program, Program):
        inputs = made.program.example_inputs(made.program.signature.batch_size or 3, seed=2)
        with torch.no_grad():
            found = made.program.module.eval()(*inputs)
        assert all(each.isfinite().all() for each in found if each.is_floating_point()), "outputs are not finite"
        return "no file"
    if isinstance(made.program, FileProgram):
        path = made.program.path
    else:
        form: Format = "packed" if kind in PACKED else "onnx"
        if recipe.target.runtime == "torch":
            form = "pt2"
        path = directory / f"model.{form}"
        export(made.program, made.module, form, path, recipe.target)
    _compare(made, path)
    return path.name


def _compare(made: Made, path: Path) -> None:
    """Raise AssertionError where the loaded file does not give what the module gives."""
    signature = made.module.signature
    inputs = made.module.example_inputs(signature.batch_size or 3, seed=2)
    with torch.no_grad():
        expected: tuple[Tensor, ...] = made.module.module.eval()(*inputs)
    names = [each.name for each in signature.inputs], [each.name for each in signature.outputs]
    content = load.unpack(path.read_bytes()) if path.suffix == ".packed" else str(path)
    predict = load._load_pt2(path, *names, "cpu") if path.suffix == ".pt2" else load._load_onnx(content, *names)
    found = predict({name: each.numpy() for name, each in zip(names[0], inputs, strict=True)})
    for name, tensor in zip(names[1], expected, strict=True):
        wanted = tensor.numpy()
        assert found[name].shape == wanted.shape, f"{path.name}: {name} has shape {found[name].shape}"
        assert np.isfinite(found[name]).all(), f"{path.name}: {name} is not finite"
        difference = float(np.abs(found[name] - wanted).max())
        bound = choose_tolerance(wanted, integer=bool(find_integer_layers(made.module)))
        # A file of 8-bit arithmetic has no module to equal.
        assert isinstance(made.program, FileProgram) or difference <= bound, (
            f"{path.name}: {name} differs by {difference:.3g}, {bound:.3g} is allowed"
        )


def fill_row(upload: Upload, columns: list[str], cells: dict[str, Cell], log: Path | None, *, files: bool) -> None:
    """Fill what is missing of one row."""
    missing = [column for column in columns if f"{upload.name}|{column}" not in cells]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as place:
        subject = open_subject(upload, Path(place))
        for column in missing:
            started_at = time.perf_counter()
            cell = fill(subject, column, files=files)
            name = f"{upload.name}|{column}"
            cells[name] = cell
            print(f"{name}: {cell['outcome']} ({time.perf_counter() - started_at:.0f} s) {cell['note']}", flush=True)
            if log is not None:
                with log.open("a") as lines:
                    lines.write(json.dumps({"name": name, **cell}) + "\n")


def print_table(names: list[str], columns: list[str], cells: dict[str, Cell]) -> None:
    """Print the table, then every reason once."""
    print("\n| model | " + " | ".join(columns) + " |")
    print("|---|" + ":-:|" * len(columns))
    notes: dict[str, int] = {}
    for name in names:
        row = []
        for column in columns:
            cell = cells.get(f"{name}|{column}")
            if cell is None:
                row.append("-")
                continue
            word = SIGNS[cell["outcome"]]
            if cell["outcome"] not in ("works", "ran"):
                number = notes.setdefault(f"{column}: {cell['note']}", len(notes) + 1)
                word += f" ({number})"
            row.append(word)
        print(f"| {name} | " + " | ".join(row) + " |")
    print()
    for note, number in notes.items():
        print(f"{number}. {note}")


def main() -> None:
    """Fill and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    uploads = {each.name: each for each in list_uploads()}
    parser.add_argument("--models", nargs="+", choices=list(uploads), default=list(uploads), metavar="MODEL")
    parser.add_argument("--columns", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="KIND")
    parser.add_argument("--log", type=Path, help="file of finished cells")
    parser.add_argument("--without-files", action="store_true", help="call the programs, write no files: minutes less")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[str, Cell] = {}
    if given.log is not None and given.log.exists():
        for line in given.log.read_text().splitlines():
            cell = json.loads(line)
            cells[cell.pop("name")] = cell
    for name in given.models:
        fill_row(uploads[name], given.columns, cells, given.log, files=not given.without_files)
    print_table(given.models, given.columns, cells)


if __name__ == "__main__":
    main()
