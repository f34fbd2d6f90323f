"""Does judging weights with their activations (Wanda) beat judging them alone, at the same number of zeros?

    python benchmarks/wanda.py [--sparsities 0.5 0.6] [--calibration 128] [--threads 2]

The model and the text are those of benchmarks/language_model.py (trained once, then kept). Nothing is trained after
pruning. Perplexity is that of held-out docstrings, which calibration never sees.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from app.recipes.data import Data
from app.recipes.pruning import PruneMagnitude, PruneNM, PruneWanda
from benchmarks.language_model import TrainedModel, load_or_train, measure_perplexity
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import prune_magnitude, prune_n_m, prune_wanda
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples, open_examples

DATASET, HELD_OUT = "dst_" + "a" * 26, "dst_" + "b" * 26
Method = tuple[str, str, Callable[[Program, Context], Outcome]]
"""Pattern, name, and how to prune."""


def open_text(trained: TrainedModel, program: Program, directory: Path) -> BoundExamples:
    """Bind the text that the model was trained on, and the held-out text, to the model's input."""
    (tensor,) = program.signature.inputs
    data = Data.model_validate(
        {
            "dataset_id": DATASET, "evaluation_dataset_id": HELD_OUT, "inputs": {tensor.name: {"column": "tokens"}},
            "task": "language_modeling",
        }
    )  # fmt: skip
    files: Any = {DATASET: (trained.training, "npz"), HELD_OUT: (trained.held_out, "npz")}
    return open_examples(data, files, program.signature, 0, directory)


def list_methods(sparsities: list[float], calibration: int) -> Iterator[Method]:
    """Yield what is compared; within one pattern all leave the same number of zeros."""
    for sparsity in sparsities:
        pattern = f"{sparsity:.0%}"
        for scope in ("global", "local"):
            plain = PruneMagnitude.model_validate({"kind": "prune_magnitude", "sparsity": sparsity, "scope": scope})
            yield pattern, f"magnitude, {scope}", lambda p, c, step=plain: prune_magnitude.run(p, step, c)  # type: ignore[misc]
        judged = PruneWanda(kind="prune_wanda", sparsity=sparsity, num_calibration_examples=calibration)
        yield pattern, "Wanda", lambda p, c, step=judged: prune_wanda.run(p, step, c)  # type: ignore[misc]
    for n, m in ((2, 4), (4, 8)):
        for name in ("magnitude", "wanda"):
            block = PruneNM.model_validate(
                {"kind": "prune_n_m", "n": n, "m": m, "criterion": name, "num_calibration_examples": calibration}
            )
            title = name.replace("wanda", "Wanda")
            yield f"{n}:{m}", title, lambda p, c, step=block: prune_n_m.run(p, step, c)  # type: ignore[misc]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.3, 0.5, 0.6, 0.7])
    parser.add_argument("--calibration", type=int, default=128, help="rows of 128 tokens that the norms are taken from")
    parser.add_argument("--rows", type=int, default=300, help="held-out rows of 128 tokens to measure on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    trained = load_or_train(num_threads=options.threads)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = open_program(trained.model, directory)
        examples = open_text(trained, program, directory)
        perplexity = measure_perplexity(program.module.eval(), trained.held_out, options.rows)
        print(f"calibration: {options.calibration} rows of training text; measured on {options.rows} held-out rows\n")
        print("| pattern | judged by | zeros | perplexity | seconds |\n|---|---|---:|---:|---:|", flush=True)
        print(f"| dense | | 0.0% | {perplexity:.2f} | |", flush=True)
        for pattern, title, prune in list_methods(options.sparsities, options.calibration):
            program = open_program(trained.model, directory)
            started_at = time.perf_counter()
            outcome = prune(program, Context(0, options.threads, directory, examples, lambda *_, **__: None))
            seconds = time.perf_counter() - started_at
            perplexity = measure_perplexity(program.module.eval(), trained.held_out, options.rows)
            zeros = float(outcome.facts["sparsity"] or 0)
            print(f"| {pattern} | {title} | {zeros:.1%} | {perplexity:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
